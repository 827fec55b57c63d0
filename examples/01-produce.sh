#!/bin/sh
# Create a topic and put records into it: one, one with a key and headers, a batch of lines.
set -eu
URL=${URL:-http://127.0.0.1:1109} TOKEN=${TOKEN:-dev}
call() { curl -sS --fail-with-body -H "Authorization: Bearer $TOKEN" "$@"; }
must() { case $2 in *"$1"*) echo "   $2" ;; *) echo "$0: expected $1 in: $2" >&2; exit 1 ;; esac; }

topic=orders-$$

echo "1. create $topic with 4 partitions; asking again changes nothing"
must '"partitions":4' "$(call -d "{\"name\":\"$topic\",\"partitions\":4}" "$URL/broker/topics")"
must '"created":false' "$(call -d "{\"name\":\"$topic\",\"partitions\":4}" "$URL/broker/topics")"

echo "2. one record: the body is the value; the answer comes when it is on disk"
must '"offset":0,"partition":0' "$(call -d 'first order' "$URL/broker/topics/$topic/produce?partition=0")"

echo "3. a key chooses the partition (as Kafka's clients do), Ayder-Header-* become headers of the record"
answer=$(call -H 'Ayder-Header-source: shop' -d 'second order' "$URL/broker/topics/$topic/produce?key=alice")
must '"durable":true' "$answer"
partition=$(echo "$answer" | sed 's/.*"partition":\([0-9]*\).*/\1/')
must "\"partition\":$partition," "$(call -d 'third order' "$URL/broker/topics/$topic/produce?key=alice")"

echo "4. a batch: one record a line, all of them or none, side by side"
must '"first_offset":1,"count":3' "$(printf 'four\nfive\nsix\n' | call --data-binary @- "$URL/broker/topics/$topic/produce-ndjson?partition=0")"

echo "5. a partition that is not there is refused: nothing happened"
must '"outcome":"not_applied"' "$(curl -sS -H "Authorization: Bearer $TOKEN" -d x "$URL/broker/topics/$topic/produce?partition=9")"

must '"deleted":true' "$(call -X DELETE "$URL/broker/topics/$topic")"
