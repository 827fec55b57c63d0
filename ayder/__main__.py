"""The command line: ``ayder serve``, ``ayder cluster``, ``ayder check-config``, ``ayder --version``.

Owns: flags, exit codes (0 clean stop, 1 the node failed, 2 the settings are wrong) and what is printed for people. Must not
know: how a node works; it is imported only when one is started, so that the other commands and every mistake are quick.
"""

import argparse
import errno
import functools
import os
import shlex
import sys
import traceback
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from ayder import __version__, config_report, launch
from ayder.config import DEV_TOKEN, Config, ConfigError, token_hash

__all__ = ["main"]

EXIT_FAILED = 1
EXIT_MISCONFIGURED = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0].startswith("-") and arguments[0] not in ("-h", "--help", "--version"):
        arguments.insert(0, "serve")  # the predecessor had no commands, only flags
    options = _parser().parse_args(arguments)
    try:
        launch.refuse_optimised()
        command: Callable[[argparse.Namespace], int] = options.command
        return command(options)
    except ConfigError as exc:
        for mistake in exc.mistakes:
            print(f"ayder: {mistake}", file=sys.stderr)
        return EXIT_MISCONFIGURED


def _configured(options: argparse.Namespace) -> Config:
    """The settings of a command line; what the operator should hear is said. Raises ``ConfigError``."""
    flags, warnings = _settings_of(options)
    config = launch.config_from_process(flags, config_path=options.config)
    for warning in (*warnings, *config.warnings):
        print(f"ayder: warning: {warning}", file=sys.stderr)
    return config


# ---- flags ----


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ayder", description="An HTTP-native durable event log; curl is the client.")
    parser.add_argument("--version", action="version", version=f"ayder {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="run a node until it is told to stop (SIGTERM, Ctrl-C)")
    serve.set_defaults(command=_serve)
    check = commands.add_parser("check-config", help="print every setting and where it comes from; start nothing")
    check.set_defaults(command=_check_config)
    for command in (serve, check):
        _add_setting_flags(command)
        _add_old_flags(command)
    _add_cluster(commands.add_parser("cluster", help="run a cluster on this machine, for trying things"))
    return parser


def _add_cluster(command: argparse.ArgumentParser) -> None:
    command.set_defaults(command=_cluster)
    command.add_argument("--nodes", metavar="N", type=int, default=3, help="1, 3 (default), 5 or 7")
    command.add_argument("--data", metavar="DIR", default="./cluster-data", help="directory of all nodes (default %(default)s)")
    command.add_argument(
        "--base-port",
        metavar="PORT",
        type=int,
        default=11090,
        help="peers on PORT, +2, +4 ...; clients one above (default 11090)",
    )
    command.add_argument("--config", metavar="FILE.toml", help="settings of every node")
    command.add_argument("--set", metavar="SECTION.KEY=VALUE", action="append", default=[], help="a setting of every node")


def _add_setting_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--bind", metavar="HOST:PORT", help="address to listen on (default 127.0.0.1:1109)")
    command.add_argument("--data", metavar="DIR", help="directory that holds everything (default ./data)")
    command.add_argument("--config", metavar="FILE.toml", help="settings, below environment and flags")
    command.add_argument("--set", metavar="SECTION.KEY=VALUE", action="append", default=[], help="any setting, repeatable")


def _add_old_flags(command: argparse.ArgumentParser) -> None:
    old = command.add_argument_group("flags of the predecessor")
    old.add_argument("--port", "-p", metavar="N", help="port to listen on")
    old.add_argument("--http", metavar="[HOST]:N", help="address to listen on")
    old.add_argument("--workers", metavar="N", help="accepted; a node is one process")
    old.add_argument("--aof", metavar="MODE", help="accepted; a record is always on disk before its answer")


def _settings_of(options: argparse.Namespace) -> tuple[dict[str, str], list[str]]:
    """Flags as ``section.key`` → text, and warnings. Rank: ``--set`` > ``--bind`` > ``--port`` > ``--http``."""
    flags: dict[str, str] = {}
    if options.http is not None:
        flags |= _address("--http", options.http, host_required=False)
    if options.port is not None:
        flags["http.port"] = options.port
    if options.bind is not None:
        flags |= _address("--bind", options.bind, host_required=True)
    if options.data is not None:
        flags["storage.data_dir"] = options.data
    for text in options.set:
        path, equals, value = text.partition("=")
        if not equals:
            raise ConfigError([f"flag --set {text}: expected SECTION.KEY=VALUE"])
        flags[path.strip()] = value
    return flags, _meaningless(options)


def _address(flag: str, text: str, *, host_required: bool) -> dict[str, str]:
    host, colon, port = text.rpartition(":")
    if (host_required and not (host and colon)) or not port.isascii() or not port.isdigit():
        raise ConfigError([f"flag {flag} {text}: expected {'HOST:PORT' if host_required else '[HOST]:PORT'}"])
    host = host.removeprefix("[").removesuffix("]")
    return {"http.port": port} | ({"http.host": host} if host else {})


def _meaningless(options: argparse.Namespace) -> list[str]:
    warnings = []
    if options.workers not in (None, "1"):
        warnings.append(f"--workers {options.workers}: a node is one process; the flag changes nothing")
    if options.aof not in (None, "always"):
        warnings.append(f"--aof {options.aof}: a record is always on disk before its answer; the flag changes nothing")
    return warnings


# ---- commands ----


def _check_config(options: argparse.Namespace) -> int:
    config = _configured(options)
    try:
        print("\n".join(config_report.effective_settings(config)), flush=True)
    except BrokenPipeError:  # `ayder check-config | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _serve(options: argparse.Namespace) -> int:
    config, generated = launch.with_token(_configured(options))
    import trio  # noqa: PLC0415  (only a node needs it)

    from ayder import node  # noqa: PLC0415

    try:
        trio.run(_run_and_announce, node.run_node, config, generated)
    except (Exception, KeyboardInterrupt, BaseExceptionGroup) as exc:
        # The last frame of the process: whatever ended the node is said once, in words.
        causes = _leaves(exc)
        if all(isinstance(cause, KeyboardInterrupt) for cause in causes):
            return EXIT_INTERRUPTED
        _say_why(causes, config)
        return EXIT_FAILED
    return 0


def _cluster(options: argparse.Namespace) -> int:
    import trio  # noqa: PLC0415  (only who runs nodes needs it)

    from ayder import local_cluster  # noqa: PLC0415

    try:
        members = local_cluster.local_members(options.nodes, options.base_port)
    except ValueError as exc:
        raise ConfigError([f"flags --nodes {options.nodes} --base-port {options.base_port}: {exc}"]) from exc
    if not members:
        raise ConfigError([f"flag --nodes {options.nodes}: a cluster has 1, 3, 5 or 7 nodes"])
    more = [
        *(("--config", options.config) if options.config else ()),
        *(part for text in options.set for part in ("--set", text)),
    ]
    data_dir = os.path.abspath(options.data)
    flags = local_cluster.serve_flags(members[0], members, data_dir)
    config = _configured(_parser().parse_args(["serve", *flags, *more]))  # a mistake is said once, before anything is started
    nodes = local_cluster.local_nodes(members, data_dir, more)
    cluster = local_cluster.LocalCluster(nodes, functools.partial(print, flush=True), cluster_greeting(config, data_dir))
    try:
        return trio.run(cluster.run)
    except* OSError as group:
        for cause in _leaves(group):
            print(f"ayder: {cause}", file=sys.stderr)
    return EXIT_FAILED


async def _run_and_announce(run_node: Callable[..., Awaitable[None]], config: Config, generated: str | None) -> None:
    """Run the node; once it says (``task_status.started``) that it listens, print how to talk to it."""
    import trio  # noqa: PLC0415

    async with trio.open_nursery() as nursery:
        urls = await nursery.start(functools.partial(run_node, config))
        print("\n".join(greeting(config, generated, _first_url(urls, config))), flush=True)


def _first_url(urls: Any, config: Config) -> str:
    """Where the node says it listens (a URL or several), else where it was told to."""
    if isinstance(urls, (list, tuple)) and urls:
        urls = urls[0]
    if isinstance(urls, str) and "://" in urls:
        return urls.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.http.host, config.http.host)  # noqa: S104  (compared, not bound)
    scheme = "https" if config.http.tls_certificate else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{config.http.port}"


def greeting(config: Config, generated: str | None, url: str) -> list[str]:
    """The lines printed at start: the URL, the other members, the token (or where it is), and three calls to paste."""
    token, said = _token_of(config, generated)
    lines = [f"ayder {__version__} listens on {url}", f"token: {said}", "", *_calls(config, token, url)]
    if config.cluster.nodes:
        lines.insert(1, _membership(config))
    return lines


def _membership(config: Config) -> str:
    others = [f"{member.id} {member.client_url}" for member in config.cluster.nodes if member.id != config.raft.node_id]
    return f"{config.raft.node_id} of cluster {config.cluster.name}, with {', '.join(others) or 'nobody else'}"


def cluster_greeting(config: Config, data_dir: str) -> list[str]:
    """What ``ayder cluster`` prints once its nodes listen; ``config`` is that of one of them."""
    token, said = _token_of(config, None)
    return [
        f"ayder {__version__}: a cluster of {len(config.cluster.nodes)}, everything in {data_dir}",
        *(f"{member.id} listens on {member.client_url}" for member in config.cluster.nodes),
        f"token: {said}",
        "",
        *_calls(config, token, config.cluster.nodes[0].client_url),
        "",
    ]


def _token_of(config: Config, generated: str | None) -> tuple[str, str]:
    """A token as a shell writes it in a call, and what is said about it. A configured one is never shown."""
    if generated is not None:
        return f"$(cat {shlex.quote(launch.token_path(config))})", f"{generated} (kept in {launch.token_path(config)})"
    if any(one.sha256 == token_hash(DEV_TOKEN) for one in config.auth.tokens):
        return DEV_TOKEN, DEV_TOKEN
    return "$TOKEN", f"configured: {', '.join(one.name for one in config.auth.tokens)} (put yours into TOKEN)"


def _calls(config: Config, token: str, url: str) -> list[str]:
    # A follower redirects to the leader. With -L alone curl sends the body there, but not the token.
    member = bool(config.cluster.nodes)
    curl = f'curl {"-L --location-trusted " if member else ""}-H "Authorization: Bearer {token}"'
    first = f"{url}/broker/consume/orders/readers/0"
    return [
        f"""{curl} -d '{{"name":"orders","partitions":4}}' {url}/broker/topics""",
        f"""{curl} -d 'hello' '{url}/broker/topics/orders/produce?partition=0'""",
        f"{curl} '{first}?redirect=1'" if member else f"{curl} {first}",
    ]


# ---- what ended the node ----


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for part in error.exceptions for leaf in _leaves(part)]
    return [error]


def _say_why(causes: list[BaseException], config: Config) -> None:
    """One line for each cause. What we did not foresee is shown with its traceback: it is a bug to report."""
    for cause in causes:
        foreseen = isinstance(cause, OSError) or type(cause).__module__.partition(".")[0] == "ayder"
        if not foreseen:
            traceback.print_exception(cause)
        text = str(cause) or type(cause).__name__
        if isinstance(cause, OSError) and cause.errno == errno.EADDRINUSE:
            text = f"{config.http.host}:{config.http.port} is taken: another process listens there"
        print(f"ayder: {text if foreseen else f'{type(cause).__name__}: {text}'}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
