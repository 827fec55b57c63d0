#!/bin/sh
# Consumer groups: read, commit, go on where the group was; see its lag; rewind.
set -eu
URL=${URL:-http://127.0.0.1:1109} TOKEN=${TOKEN:-dev}
call() { curl -sS --fail-with-body -H "Authorization: Bearer $TOKEN" "$@"; }
must() { case $2 in *"$1"*) echo "   $2" ;; *) echo "$0: expected $1 in: $2" >&2; exit 1 ;; esac; }

topic=groups-$$ group=billing-$$
consume="$URL/broker/consume/$topic/$group/0"
commit() { call -d "{\"topic\":\"$topic\",\"group\":\"$group\",\"partition\":0,$1}" "$URL/broker/commit"; }

echo "1. five records"
must '"count":5' "$(printf '%s\n' a b c d e | call --data-binary @- "$URL/broker/topics/$topic/produce-ndjson?partition=0")"

echo "2. a group without a commit reads from the start"
must '"committed_offset":null' "$(call "$consume?limit=2")"

echo "3. commit offset 1, the last one processed"
must '"ignored":false' "$(commit '"offset":1')"

echo "4. the group goes on right after it"
must '"messages":[{"offset":2' "$(call "$consume?limit=1")"

echo "5. a commit that would go back is ignored"
must '"ignored":true' "$(commit '"offset":0')"

echo "6. how far the group is behind"
must '"lag":3' "$(call "$URL/broker/groups/$group")"

echo "7. beyond the end is refused"
must '"error":"offset_out_of_range"' "$(curl -sS -H "Authorization: Bearer $TOKEN" \
    -d "{\"topic\":\"$topic\",\"group\":\"$group\",\"partition\":0,\"offset\":99}" "$URL/broker/commit")"

echo "8. rewind, on purpose"
must '"ignored":false' "$(commit '"offset":0,"reset":true')"
must '"messages":[{"offset":1' "$(call "$consume?limit=1")"

must '"deleted":true' "$(call -X DELETE "$URL/broker/topics/$topic")"
