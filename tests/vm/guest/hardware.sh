#!/bin/bash
# In the guest, at every boot and before the daemon: the gateway's hardware. A GPIO chip "board" with the lines NRST and BOOT0
# (of the target in this guest) and NRST_OUT and BOOT0_OUT (of the one outside), pulls as on a board; a pair of serial ports.
set -euo pipefail
chip=/sys/kernel/config/gpio-sim/board
case "${1:-all}" in
all)
  modprobe gpio-sim-oot
  modprobe uartpair
  mkdir -p "$chip/bank"
  echo board > "$chip/bank/label"
  echo 8 > "$chip/bank/num_lines"
  offset=2
  for name in NRST BOOT0 NRST_OUT BOOT0_OUT; do
    mkdir -p "$chip/bank/line$offset"
    echo "$name" > "$chip/bank/line$offset/name"
    offset=$((offset + 1))
  done
  ;&
plug)
  echo 1 > "$chip/live"
  sysfs=/sys/devices/platform/$(cat $chip/dev_name)/$(cat $chip/bank/chip_name)
  for offset in 2 4; do echo pull-up > "$sysfs/sim_gpio$offset/pull"; done
  for offset in 3 5; do echo pull-down > "$sysfs/sim_gpio$offset/pull"; done
  # For the tests: everything that happens to the lines, with its time.
  trace=/sys/kernel/tracing/instances/judge
  mkdir -p $trace
  echo mono > $trace/trace_clock
  echo 1 > $trace/events/gpio/enable
  udevadm settle
  ;;
pull)
  echo 0 > "$chip/live"
  ;;
esac
