#!/bin/sh
# Makes the secrets that docker-compose.yml reads, each in a file, with passwords drawn by chance:
#
#   sh deploy/secrets.sh            # into secrets/, once, before the first `docker compose up`
#
# redis_users.acl       deploy/redis/users.acl with its passwords
# broker_url_USER       Redis' URL for each of its users: worker, trainer, operator, and producer for your applications
# postgres_password     of PostgreSQL's superuser
# postgres_roles.sql    gives the roles of deploy/postgresql/roles.sql their passwords
# database_url_ROLE     PostgreSQL's URL for each of them: owner, worker, trainer, webhooks, reader, and client
#                       for your applications
# grafana_password      of its user admin
#
# Where the folder is there already it is left alone: the servers' volumes know the passwords in it.
set -eu
cd "$(dirname "$0")/.."
folder=${1:-secrets}
if [ -e "$folder" ]; then
    echo "$folder is there already, and is left as it is" >&2
    exit 1
fi

password() {
    od -An -N24 -tx1 /dev/urandom | tr -d ' \n'
}

umask 077
unfinished=$(mktemp -d "$folder.XXXXXX")
trap 'rm -rf "$unfinished"' EXIT
cp deploy/redis/users.acl "$unfinished/redis_users.acl"
for user in producer worker trainer operator; do
    secret=$(password)
    placeholder=$(echo "$user" | tr '[:lower:]' '[:upper:]')_PASSWORD
    # By a pipe: what stands in a command line, everyone on this machine can see.
    echo "s/>$placeholder />$secret /" | sed -f - "$unfinished/redis_users.acl" > "$unfinished/acl"
    mv "$unfinished/acl" "$unfinished/redis_users.acl"
    echo "redis://$user:$secret@redis:6379/0" > "$unfinished/broker_url_$user"
done
for role in owner worker trainer client webhooks reader; do
    secret=$(password)
    echo "ALTER ROLE moderato_$role PASSWORD '$secret';" >> "$unfinished/postgres_roles.sql"
    echo "postgresql://moderato_$role:$secret@postgres:5432/moderato" > "$unfinished/database_url_$role"
done
password > "$unfinished/postgres_password"
password > "$unfinished/grafana_password"
# Docker hands a file on with its owner and mode, and a container's user is not yours. On this machine the folder, which
# is yours alone, keeps everyone else from them.
chmod 0444 "$unfinished"/*
mv "$unfinished" "$folder"
echo "made $folder: $(ls "$folder" | tr '\n' ' ')"
