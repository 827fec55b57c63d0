#!/bin/sh
# Read records: from an offset, from the end, in other formats, and waiting for what is not there yet.
set -eu
URL=${URL:-http://127.0.0.1:1109} TOKEN=${TOKEN:-dev}
call() { curl -sS --fail-with-body -H "Authorization: Bearer $TOKEN" "$@"; }
must() { case $2 in *"$1"*) echo "   $2" ;; *) echo "$0: expected $1 in: $2" >&2; exit 1 ;; esac; }

topic=consume-$$
records="$URL/broker/topics/$topic/0/records"

echo "1. three records"
must '"count":3' "$(printf 'a\nb\nc\n' | call --data-binary @- "$URL/broker/topics/$topic/produce-ndjson?partition=0")"

echo "2. a page from offset 1; next_offset is where the next page begins"
must '"next_offset":3' "$(call "$records?offset=1")"

echo "3. one record at a time: truncated says that more is there"
must '"truncated":true' "$(call "$records?from=earliest&limit=1")"

echo "4. the last one"
must '"value":"c"' "$(call "$records?from=tail:1")"

echo "5. values as base64, for bytes that are not text"
must '"value_b64":"Yw=="' "$(call "$records?from=tail:1&encoding=b64")"

echo "6. one record a line"
must '"value":"b"' "$(call -H 'Accept: application/x-ndjson' "$records?offset=1&limit=1")"

echo "7. wait (at most 10 s) for a record that is sent in a second"
(sleep 1 && call -d 'd' "$URL/broker/topics/$topic/produce?partition=0" >/dev/null) &
must '"value":"d"' "$(call "$records?from=latest&wait_ms=10000")"
wait

echo "8. an unknown topic is 404"
must '"error":"topic_not_found"' "$(curl -sS -H "Authorization: Bearer $TOKEN" "$URL/broker/topics/none-$$/0/records")"

must '"deleted":true' "$(call -X DELETE "$URL/broker/topics/$topic")"
