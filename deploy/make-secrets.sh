#!/bin/sh
# make-secrets.sh DIR NODE...   What the nodes of a cluster need to trust each other, and a token for their clients.
#
#   DIR/authority/   ca-key.pem (signs new nodes; no node needs it), ca.pem, token (in plain text, for you)
#   DIR/NODE/        ca.pem, certificate.pem (its only name is NODE), key.pem, tokens.toml (the token's SHA-256)
#
# Run it as often as you like: what is there and valid for another 60 days is kept. CLUSTER_TOKEN sets the token;
# without it one is made.
# OWNER=UID:GID gives the nodes' files to the user they run as. Needs openssl.
set -eu
umask 077
[ $# -ge 2 ] || { echo "usage: $0 DIR NODE..." >&2; exit 2; }
dir=$1
shift
for node in "$@"; do
    case $node in
        '' | authority | -* | .* | *[!A-Za-z0-9._-]*) echo "$0: not the name of a node: $node" >&2; exit 2 ;;
    esac
done
CA_DAYS=3650 NODE_DAYS=365 KEEP_S=$((60 * 86400))

authority=$dir/authority
mkdir -p "$authority"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

new_key() { openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1" 2>/dev/null; }

make_authority() {
    cat >"$work/ca.cnf" <<END
[req]
prompt = no
distinguished_name = name
x509_extensions = authority
[name]
O = ayder cluster authority
[authority]
basicConstraints = critical, CA:TRUE, pathlen:0
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
END
    new_key "$work/ca-key.pem"
    openssl req -x509 -new -sha256 -config "$work/ca.cnf" -key "$work/ca-key.pem" -days $CA_DAYS -out "$work/ca.pem"
    mv "$work/ca-key.pem" "$authority/ca-key.pem"
    mv "$work/ca.pem" "$authority/ca.pem" # last: without it the next run begins again
    echo "a new authority"
}

certified() { # NODE: it has a key and a certificate for it, by this authority, for its name, for a while
    mine=$dir/$1
    [ -s "$mine/key.pem" ] && [ -s "$mine/certificate.pem" ] || return 1
    openssl x509 -in "$mine/certificate.pem" -noout -checkend $KEEP_S >/dev/null || return 1
    openssl verify -CAfile "$authority/ca.pem" "$mine/certificate.pem" >/dev/null 2>&1 || return 1
    openssl x509 -in "$mine/certificate.pem" -noout -text | grep -qx " *DNS:$1" || return 1
    [ "$(openssl x509 -in "$mine/certificate.pem" -noout -pubkey)" = "$(openssl pkey -in "$mine/key.pem" -pubout)" ]
}

certify() { # NODE
    cat >"$work/node.cnf" <<END
[req]
prompt = no
distinguished_name = name
[name]
O = ayder cluster node
[node]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth, clientAuth
subjectAltName = DNS:$1
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
END
    new_key "$work/key.pem"
    openssl req -new -sha256 -config "$work/node.cnf" -key "$work/key.pem" -out "$work/request.pem"
    openssl x509 -req -sha256 -in "$work/request.pem" -CA "$authority/ca.pem" -CAkey "$authority/ca-key.pem" \
        -set_serial "0x$(openssl rand -hex 16)" -days $NODE_DAYS -extfile "$work/node.cnf" -extensions node \
        -out "$work/certificate.pem" 2>/dev/null
    mv "$work/key.pem" "$dir/$1/key.pem"
    mv "$work/certificate.pem" "$dir/$1/certificate.pem"
    echo "a new certificate for $1"
}

[ -s "$authority/ca.pem" ] || make_authority
if [ -n "${CLUSTER_TOKEN:-}" ]; then printf '%s\n' "$CLUSTER_TOKEN" >"$authority/token"; fi
[ -s "$authority/token" ] || openssl rand -hex 32 >"$authority/token"
digest=$(tr -d '\n' <"$authority/token" | openssl dgst -sha256 -r | cut -d ' ' -f 1)
for node in "$@"; do
    mkdir -p "$dir/$node"
    certified "$node" || certify "$node"
    cp "$authority/ca.pem" "$dir/$node/ca.pem"
    printf '[[auth.tokens]]\nname = "operator"\nsha256 = "%s"\n' "$digest" >"$dir/$node/tokens.toml"
    if [ -n "${OWNER:-}" ]; then chown -R "$OWNER" "$dir/$node"; fi
done
