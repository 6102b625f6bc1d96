#!/usr/bin/env bash
# Check the files of this folder with the tools that read them, where those are there or can be installed.
set -euo pipefail
cd "$(dirname "$0")"

have() {
	command -v "$1" >/dev/null && return
	[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
	{ apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$2"; } >/dev/null 2>&1
	command -v "$1" >/dev/null
}

if have systemd-analyze systemd; then
	# verify wants the program and the settings to be there: give it copies whose paths are.
	tmp=$(mktemp -d)
	trap 'rm -rf "$tmp"' EXIT
	for unit in systemd/*.service; do
		sed -e "s,/usr/local/bin/millrace,/bin/true," "$unit" >"$tmp/$(basename "$unit")"
	done
	out=$(systemd-analyze verify --man=no "$tmp"/millrace-broker.service "$tmp"/millrace-aggregator.service "$tmp"/millrace-worker@0.service 2>&1) ||
		{ echo "$out"; exit 1; }
	# It reports unknown settings without failing.
	if grep -q "$tmp\|millrace-" <<<"$out"; then echo "$out"; exit 1; fi
	echo "systemd-analyze: the units are well formed"
else
	echo "systemd-analyze cannot be installed here: units not checked"
fi
if have promtool prometheus; then
	promtool check config prometheus/prometheus.yml # and the rules that it names
	promtool test rules prometheus/rules_test.yml
else
	echo "promtool cannot be installed here: scrape configuration and alerts not checked"
fi
