#!/bin/sh
# Three nodes on this machine: write, kill the leader with SIGKILL, go on writing, restart it, compare what every node has.
set -eu
here=$(cd "$(dirname "$0")/../.." && pwd)
if [ -z "${AYDER:-}" ]; then
    AYDER=ayder
    if [ -x "$here/.venv/bin/ayder" ]; then AYDER=$here/.venv/bin/ayder; fi
fi
BASE_PORT=${BASE_PORT:-11190} TOKEN=dev
PATIENCE_S=${PATIENCE_S:-20}
topic=orders
dir=$(mktemp -d)
pid_1='' pid_2='' pid_3=''

pid() { eval "echo \$pid_$1"; }
url() { echo "http://127.0.0.1:$((BASE_PORT + 2 * $1 - 1))"; }
# A follower redirects to the leader. --location-trusted lets curl send the token there, too.
call() { curl -sS -m 5 -L --location-trusted -H "Authorization: Bearer $TOKEN" "$@"; }
fail() {
    echo "$0: $*" >&2
    for n in 1 2 3; do
        if [ -f "$dir/node-$n.log" ]; then tail -n 5 "$dir/node-$n.log" | sed "s/^/   node-$n: /" >&2; fi
    done
    exit 1
}
clean_up() {
    for n in 1 2 3; do if [ -n "$(pid $n)" ]; then kill -9 "$(pid $n)" 2>/dev/null || true; fi; done
    wait 2>/dev/null || true
    rm -rf "$dir"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

start() { # NODE
    # shellcheck disable=SC2086  # AYDER may be several words
    $AYDER serve --bind "127.0.0.1:$((BASE_PORT + 2 * $1 - 1))" --data "$dir/node-$1" \
        --set "raft.node_id=node-$1" --set "cluster.nodes=$nodes" >>"$dir/node-$1.log" 2>&1 &
    eval "pid_$1=$!"
}
wait_ready() { # NODE...; a node is ready when it knows the leader and has applied what is committed
    deadline=$(($(date +%s) + PATIENCE_S))
    for n in "$@"; do
        until curl -sS -m 2 "$(url "$n")/ready" 2>/dev/null | grep -q '"ready":true'; do
            kill -0 "$(pid "$n")" 2>/dev/null || fail "node-$n has ended"
            [ "$(date +%s)" -lt "$deadline" ] || fail "node-$n is not ready: $(curl -sS -m 2 "$(url "$n")/ready" 2>&1)"
            sleep 0.1
        done
    done
}
leader() { # as this NODE sees it: a number
    curl -sS -m 2 "$(url "$1")/ready" | sed -n 's/.*"leader":"node-\([0-9]*\)".*/\1/p'
}
write() { # NUMBER; asks again until it is acknowledged: the idempotency key sees to it that one record is written
    deadline=$(($(date +%s) + PATIENCE_S)) tries=0 answer=
    while [ "$(date +%s)" -lt "$deadline" ]; do
        node=$((($1 + tries) % 3 + 1)) tries=$((tries + 1))
        answer=$(call -d "order $1" "$(url $node)/broker/topics/$topic/produce?partition=0&idempotency_key=order-$1" 2>&1) || true
        case $answer in *'"ok":true'*) return ;; esac
        sleep 0.05
    done
    fail "order $1 was not acknowledged in $PATIENCE_S s: $answer"
}
write_all() { # FIRST LAST
    number=$1 asked=0
    while [ "$number" -le "$2" ]; do
        write "$number"
        asked=$((asked + tries)) number=$((number + 1))
    done
    echo "   orders $1 to $2 acknowledged, $asked calls"
}
local_records() { # NODE; what this very node has, whoever leads
    call -H 'Accept: application/x-ndjson' "$(url "$1")/broker/topics/$topic/0/records?consistency=local&offset=0&limit=10000"
}

nodes=
for n in 1 2 3; do nodes="$nodes{\"id\":\"node-$n\",\"host\":\"127.0.0.1\",\"raft_port\":$((BASE_PORT + 2 * n - 2))},"; done
nodes="[${nodes%,}]"

echo "1. three nodes, everything in $dir"
for n in 1 2 3; do start $n; done
wait_ready 1 2 3
first=$(leader 1)
follower=$((first % 3 + 1))
echo "   node-$first leads"

echo "2. a topic, asked of a follower: it redirects, curl -L follows"
answer=$(call --fail-with-body -d "{\"name\":\"$topic\",\"partitions\":1}" -w ' redirects=%{num_redirects}' "$(url $follower)/broker/topics") ||
    fail "no topic: $answer"
case $answer in *'"created":true'*'redirects=1') echo "   $answer" ;; *) fail "expected a created topic and one redirect: $answer" ;; esac

echo "3. twenty orders, each sent to the next node"
write_all 1 20

echo "4. SIGKILL for the leader, and on with the next twenty at once"
killed=$first
kill -9 "$(pid "$killed")"
wait "$(pid "$killed")" 2>/dev/null || true
eval "pid_$killed="
write_all 21 40
second=$(leader $follower)
[ -n "$second" ] && [ "$second" != "$killed" ] || fail "node-$follower says that node-$second leads, but node-$killed is dead"
echo "   node-$second leads"

echo "5. an order of the dead leader, sent again: the new one knows its key"
answer=$(call -d 'order 1' "$(url "$second")/broker/topics/$topic/produce?partition=0&idempotency_key=order-1")
case $answer in *'"offset":0,'*'"duplicate":true'*) echo "   $answer" ;; *) fail "order 1 was not recognised: $answer" ;; esac

echo "6. node-$killed comes back while the last twenty are written"
start "$killed"
write_all 41 60
wait_ready 1 2 3

echo "7. every node by itself: count, order, bytes"
number=0
while [ $number -lt 60 ]; do echo "$number order $((number + 1))"; number=$((number + 1)); done >"$dir/expected"
for n in 1 2 3; do
    deadline=$(($(date +%s) + PATIENCE_S))
    until local_records $n >"$dir/records-$n" && [ "$(wc -l <"$dir/records-$n")" -ge 60 ]; do
        [ "$(date +%s)" -lt "$deadline" ] || fail "node-$n has $(wc -l <"$dir/records-$n") of 60 records"
        sleep 0.1
    done
    sed -n 's/^{"offset":\([0-9]*\),.*"value":"\([^"]*\)"}$/\1 \2/p' "$dir/records-$n" >"$dir/found-$n"
    cmp "$dir/expected" "$dir/found-$n" >&2 || fail "node-$n has other records than those that were acknowledged, or another order"
    cmp "$dir/records-1" "$dir/records-$n" >&2 || fail "node-1 and node-$n differ"
    echo "   node-$n: 60 records, $(cksum <"$dir/records-$n" | cut -d ' ' -f 1)"
done
echo "   nothing lost, nothing twice, the same bytes everywhere"
