#!/bin/sh
# Send as often as you like, have it once: idempotency keys, for one record and for a batch.
set -eu
URL=${URL:-http://127.0.0.1:1109} TOKEN=${TOKEN:-dev}
call() { curl -sS --fail-with-body -H "Authorization: Bearer $TOKEN" "$@"; }
must() { case $2 in *"$1"*) echo "   $2" ;; *) echo "$0: expected $1 in: $2" >&2; exit 1 ;; esac; }

topic=payments-$$
produce="$URL/broker/topics/$topic/produce"

echo "1. a payment"
must '"offset":0,"partition":0,' "$(call -d '10 EUR' "$produce?partition=0&idempotency_key=payment-1")"

echo "2. the answer was lost, so it is sent again: the first offset, and duplicate is true"
must '"duplicate":true' "$(call -d '10 EUR' "$produce?partition=0&idempotency_key=payment-1")"

echo "3. the same by header"
must '"duplicate":true' "$(call -H 'Idempotency-Key: payment-1' -d '10 EUR' "$produce?partition=0")"

echo "4. the same key with another body is a mistake"
must '"error":"idempotency_key_reused"' "$(curl -sS -H "Authorization: Bearer $TOKEN" -d '99 EUR' "$produce?partition=0&idempotency_key=payment-1")"

echo "5. a batch over two partitions, twice"
batch='{"value":"20 EUR","key":"alice","partition":0}
{"json":{"amount":30},"key":"bob","partition":1,"headers":{"currency":"EUR"}}'
for duplicate in false true; do
    must "\"duplicate\":$duplicate,\"results\":" "$(call -H 'Content-Type: application/vnd.ayder.records+ndjson' \
        -d "$batch" "$produce-ndjson?idempotency_key=batch-1")"
done

echo "6. one effect each"
must '"high_watermark":2' "$(call "$URL/broker/topics/$topic/0/records")"
must '"value":"{\"amount\":30}"' "$(call "$URL/broker/topics/$topic/1/records")"

must '"deleted":true' "$(call -X DELETE "$URL/broker/topics/$topic")"
