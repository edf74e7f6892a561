#!/usr/bin/env bash
# A real Slurm of two nodes on this machine, for the tests: checks/slurm.sh up | down.  Needs root and Debian's packages.
#   export SLURM_CONF=$(checks/slurm.sh up)
# Its nodes are one machine: several tasks need MASTER_ADDR=127.0.0.1 in their environment.
set -euo pipefail
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.slurm
daemons=(munged slurmctld slurmd-node1 slurmd-node2)

down() {
  for daemon in "${daemons[@]}"; do
    if [[ -s $home/$daemon.pid ]]; then
      read -r pid <"$home/$daemon.pid"
      kill "$pid" 2>/dev/null || true
      for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || break && sleep 0.1; done
    fi
  done
  rm -rf "$home"
}

install() {
  if command -v munged slurmctld slurmd sbatch >/dev/null; then return; fi
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends munge slurmctld slurmd slurm-client
}

configure() {
  mkdir -m 755 "$home"
  mkdir "$home"/{state,node1,node2}
  (umask 077 && head -c 1024 /dev/urandom >"$home/munge.key")
  cat >"$home/slurm.conf" <<CONF
ClusterName=checks
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=26817
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthInfo=socket=$home/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$home/state
SlurmctldPidFile=$home/slurmctld.pid
SlurmctldLogFile=$home/slurmctld.log
SlurmdSpoolDir=$home/%n
SlurmdPidFile=$home/slurmd-%n.pid
SlurmdLogFile=$home/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
NodeName=node[1-2] NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=[26818-26819] CPUs=$(nproc)
PartitionName=checks Nodes=ALL Default=YES MaxTime=60 State=UP
CONF
}

up() {
  install
  down
  configure
  export SLURM_CONF=$home/slurm.conf
  munged --force --key-file="$home/munge.key" --socket="$home/munge.socket" --pid-file="$home/munged.pid" \
    --log-file="$home/munged.log" --seed-file="$home/munged.seed"
  slurmctld
  slurmd -N node1
  slurmd -N node2
  for _ in $(seq 60); do
    if [[ $(sinfo --noheader --Node --states=idle 2>/dev/null | wc -l) -eq 2 ]]; then return; fi
    sleep 0.5
  done
  tail -n 20 "$home"/*.log
  return 1
}

case ${1:-} in
  up) up >&2 && echo "$home/slurm.conf" ;;
  down) down ;;
  *) sed -n '2,4s/^# *//p' "$0" >&2 && exit 2 ;;
esac
