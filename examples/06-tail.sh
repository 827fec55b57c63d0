#!/bin/sh
# Follow a partition as server-sent events; come back with Last-Event-ID and miss nothing.
set -eu
URL=${URL:-http://127.0.0.1:1109} TOKEN=${TOKEN:-dev}
call() { curl -sS --fail-with-body -H "Authorization: Bearer $TOKEN" "$@"; }
must() { case $2 in *"$1"*) echo "   ok: $1" ;; *) echo "$0: expected $1 in: $2" >&2; exit 1 ;; esac; }
produce() { printf '%s\n' "$@" | call --data-binary @- "$URL/broker/topics/$topic/produce-ndjson?partition=0" >/dev/null; }

topic=tail-$$
records="$URL/broker/topics/$topic/0/records"
seen=$(mktemp)
follower=
trap 'rm -f "$seen"; [ -z "$follower" ] || kill "$follower" 2>/dev/null || :' EXIT
await() {
    tries=100
    until grep -q "$1" "$seen"; do
        tries=$((tries - 1))
        [ $tries -gt 0 ] || { echo "$0: $1 did not come" >&2; exit 1; }
        sleep 0.1
    done
}

echo "1. two records are there; follow from the start"
produce one two
curl -sS -N -H "Authorization: Bearer $TOKEN" -H 'Accept: text/event-stream' "$records?from=earliest" >"$seen" &
follower=$!
await 'id: 1'

echo "2. a third is sent and comes at once"
produce three
await 'id: 2'
kill "$follower" && wait "$follower" 2>/dev/null || :
follower=
sed 's/^/   /' "$seen"
must '"value":"one"' "$(cat "$seen")"
must '"value":"three"' "$(cat "$seen")"

echo "3. gone for a while: two more are sent; Last-Event-ID brings exactly those"
produce four five
: >"$seen"
curl -sS -N -H "Authorization: Bearer $TOKEN" -H 'Accept: text/event-stream' -H 'Last-Event-ID: 2' "$records" >"$seen" &
follower=$!
await 'id: 4'
must '"value":"four"' "$(cat "$seen")"
case $(cat "$seen") in *'id: 2'*) echo "$0: offset 2 came twice" >&2; exit 1 ;; esac

echo "4. the topic is deleted: the stream says so and ends"
call -X DELETE "$URL/broker/topics/$topic" >/dev/null
await 'topic_deleted'
must 'event: end' "$(cat "$seen")"
