#!/usr/bin/env bash
# Run a program under mpirun over several "nodes" of one machine: network namespaces.
set -u

usage() {
    cat <<'TEXT'
usage: two_nodes.sh [-n NODES] [-s SLOTS_PER_NODE] [-r RATE] [-m "MPIRUN OPTIONS"] -- COMMAND...

  -n  number of nodes (default 2)
  -s  ranks on each node (default 1)
  -r  bandwidth of each node's network interface in each direction: 100mbit, 1gbit, ... or none (default none)
  -m  further options of mpirun, in one word

Every node has a host name, a network and (for Open MPI) a daemon of its own, so ranks of different nodes share no
memory and talk through TCP over the interface eth0: a cable between two nodes, a bridge among more. Needs Linux, root,
iproute2 (ip, tc), and Open MPI 5. Everything is removed at the end, also after a
failure or a signal.
TEXT
}

fail() {
    echo "two_nodes.sh: $*" >&2
    exit 2
}

nodes=2 slots=1 rate=none more=()
while [ $# -gt 0 ]; do
    case $1 in
        -n) nodes=${2:?} && shift 2 ;;
        -s) slots=${2:?} && shift 2 ;;
        -r) rate=${2:?} && shift 2 ;;
        -m) read -r -a more <<<"${2?}" && shift 2 ;;
        -h | --help) usage && exit 0 ;;
        --) shift && break ;;
        *) usage >&2 && fail "unknown option $1" ;;
    esac
done
[ $# -gt 0 ] || { usage >&2 && fail "no command"; }
[[ $nodes =~ ^[1-9][0-9]?$ && $slots =~ ^[1-9][0-9]*$ ]] || fail "-n (1 to 99) and -s take positive numbers"
[ "$(id -u)" = 0 ] || fail "only root may make network namespaces"
for tool in ip tc unshare mpirun; do
    command -v "$tool" >/dev/null || fail "'$tool' is not installed (ip and tc: Debian's package iproute2)"
done

label=ranks$$
folder=$(mktemp -d)
launcher=

node_name() { echo "$label-$1"; }
address() { echo "10.98.$(($$ % 250 + 1)).$(($1 + 1))"; }

clean_up() {
    trap '' INT TERM HUP
    local index name
    if [ -n "$launcher" ] && kill -TERM "$launcher" 2>/dev/null; then
        # Not for long: who sent the signal may kill this shell next, and then everything would stay.
        for ((index = 0; index < 20; index++)); do
            kill -0 "$launcher" 2>/dev/null || break
            sleep 0.1
        done
    fi
    for ((index = 0; index < nodes; index++)); do
        name=$(node_name "$index")
        # A daemon that has lost its launcher would keep the namespace alive.
        ip netns pids "$name" 2>/dev/null | xargs -r kill -KILL 2>/dev/null
        ip netns del "$name" 2>/dev/null
        rm -rf "/etc/netns/$name"
    done
    ip netns del "$label-bridge" 2>/dev/null
    rmdir /etc/netns 2>/dev/null
    rm -rf "$folder"
}
trap clean_up EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

shape() { # namespace, interface
    [ "$rate" = none ] || ip netns exec "$1" tc qdisc add dev "$2" root tbf rate "$rate" burst 256kb latency 50ms
}

# Two nodes have a cable between them. More meet at a bridge, whose forwarding takes time of the same cores.
connect() {
    local index
    if [ "$nodes" = 2 ]; then
        ip -n "$(node_name 0)" link add eth0 type veth peer name eth0 netns "$(node_name 1)"
        return
    fi
    ip netns add "$label-bridge" && ip -n "$label-bridge" link add br0 type bridge || return
    ip -n "$label-bridge" link set br0 up || return
    for ((index = 0; index < nodes; index++)); do
        ip -n "$(node_name "$index")" link add eth0 type veth peer name "port$index" netns "$label-bridge" || return
        ip -n "$label-bridge" link set "port$index" master br0 up || return
        # What a node receives from all others together.
        shape "$label-bridge" "port$index" || return
    done
}

build() {
    local index name
    for ((index = 0; index < nodes; index++)); do
        echo "$(address "$index") $(node_name "$index")" >>"$folder/hosts"
    done
    for ((index = 0; index < nodes; index++)); do
        name=$(node_name "$index")
        # `ip netns exec` shows this file to its program as /etc/hosts.
        mkdir -p "/etc/netns/$name" && { echo "127.0.0.1 localhost" && cat "$folder/hosts"; } >"/etc/netns/$name/hosts"
        ip netns add "$name" && ip -n "$name" link set lo up || return
    done
    connect || return
    for ((index = 0; index < nodes; index++)); do
        name=$(node_name "$index")
        ip -n "$name" addr add "$(address "$index")/24" dev eth0 && ip -n "$name" link set eth0 up || return
        shape "$name" eth0 || return
    done
}
build || fail "cannot make the network (in a container: is CAP_SYS_ADMIN granted?)"

# What mpirun calls in the place of ssh: [OPTIONS] ADDRESS COMMAND...
cat >"$folder/enter" <<SCRIPT
#!/usr/bin/env bash
while [[ \$1 == -* ]]; do shift; done
name=\$(awk -v address="\$1" '\$1 == address { print \$2 }' "$folder/hosts")
shift
exec ip netns exec "\$name" unshare --uts bash -c "hostname \$name && \$*"
SCRIPT
chmod +x "$folder/enter"

hosts=$(for ((index = 0; index < nodes; index++)); do echo "$(address "$index"):$slots"; done | paste -sd,)
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 GLOO_SOCKET_IFNAME=eth0
# shellcheck disable=SC2016  # the inner shell expands it
ip netns exec "$(node_name 0)" unshare --uts bash -c 'hostname "$0" && exec "$@"' "$(node_name 0)" \
    mpirun -n $((nodes * slots)) --host "$hosts" --map-by "ppr:$slots:node:oversubscribe" --bind-to none \
    --prtemca plm_ssh_agent "$folder/enter" --prtemca prte_if_include eth0 \
    --mca pml ob1 --mca btl self,sm,tcp --mca btl_tcp_if_include eth0 "${more[@]}" "$@" &
launcher=$!
wait "$launcher"
code=$?
launcher=
exit "$code"
