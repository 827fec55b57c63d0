#!/bin/sh
# Let old records go: up to an offset, by age, by size; give their disk space back.
set -eu
URL=${URL:-http://127.0.0.1:1109} TOKEN=${TOKEN:-dev}
call() { curl -sS --fail-with-body -H "Authorization: Bearer $TOKEN" "$@"; }
must() { case $2 in *"$1"*) echo "   $2" ;; *) echo "$0: expected $1 in: $2" >&2; exit 1 ;; esac; }
# Retention is enforced a few times a second: ask again until it shows.
eventually() {
    expected=$1 tries=50
    shift
    while :; do
        answer=$(call "$@")
        case $answer in *"$expected"*) echo "   $answer"; return ;; esac
        tries=$((tries - 1))
        [ $tries -gt 0 ] || { echo "$0: expected $expected in: $answer" >&2; exit 1; }
        sleep 0.2
    done
}

topic=retention-$$
records="$URL/broker/topics/$topic/0/records"

echo "1. ten records of 100 bytes"
must '"count":10' "$(seq 10 | xargs printf '%0100d\n' | call --data-binary @- "$URL/broker/topics/$topic/produce-ndjson?partition=0")"

echo "2. delete what lies before offset 4"
must '"deleted_count":4' "$(call -d "{\"topic\":\"$topic\",\"partition\":0,\"before_offset\":4}" "$URL/broker/delete-before")"
must '"log_start_offset":4' "$(call "$records?from=earliest&limit=1")"

echo "3. reading below the log start is said, never skipped in silence"
must '"error":"offset_out_of_range"' "$(curl -sS -H "Authorization: Bearer $TOKEN" "$records?offset=0")"

echo "4. keep at most 300 bytes a partition"
must '"size_applied":true' "$(call -d "{\"topic\":\"$topic\",\"max_bytes\":300}" "$URL/broker/retention")"
eventually '"log_start_offset":7' "$records?from=earliest&limit=1"

echo "5. keep a second"
must '"ttl_applied":true' "$(call -d "{\"topic\":\"$topic\",\"ttl_ms\":1000}" "$URL/broker/retention")"
eventually '"messages":[],"count":0,"next_offset":10' "$records?from=earliest"

echo "6. give back what can be given back now"
must '"ok":true' "$(call -X POST "$URL/admin/compact")"

must '"deleted":true' "$(call -X DELETE "$URL/broker/topics/$topic")"
