#!/usr/bin/env bash
# The same MuJoCo wheel gives other trajectories where glibc takes its sine without FMA: a wheel does not fix the bits.
#
# Versions: mujoco 3.17.0, numpy 2.4.6, glibc 2.36 or later on x86-64. Seen: a free pendulum of three hinges, 20,000 steps
# from one state, ends bit for bit alike in two processes, and elsewhere (by more than 1e-3) in one for which
# GLIBC_TUNABLES hides FMA and AVX2, as they are on processors before 2013 and in some virtual machines. MuJoCo calls the
# system's sin and cos, and glibc chooses theirs by what the processor has.
# We had guessed that a wheel with pinned versions, which is compiled for one instruction set and does not look at the
# processor, steps alike on every x86-64 machine. Stored rollouts and hashes of them hold among machines with FMA alone.
# Ends with 0 while this is so and with 1 once it has changed; with 0 and a word where there is no glibc with FMA to hide.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
if ! grep -qw fma /proc/cpuinfo 2>/dev/null || ! ldd --version 2>&1 | grep -qiE 'glibc|gnu libc'; then
    echo "no glibc on a processor with FMA: nothing to try"
    exit 0
fi
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q mujoco==3.17.0 numpy==2.4.6
cat >"$folder/step.py" <<'PY'
import mujoco

LINK = '<body pos="0 0 -.3"><joint type="hinge" axis="0 1 0"/><geom type="capsule" fromto="0 0 0 0 0 -.3" size=".02"/>'
model = mujoco.MjModel.from_xml_string(f"<mujoco><worldbody>{LINK * 3}{'</body>' * 3}</worldbody></mujoco>")
data = mujoco.MjData(model)
data.qpos[:] = 1.5, 1.0, -0.5
for _ in range(20000):
    mujoco.mj_step(model, data)
print(*(float(number).hex() for number in data.qpos))
PY
first="$("$folder/venv/bin/python" "$folder/step.py")"
second="$("$folder/venv/bin/python" "$folder/step.py")"
hidden="$(GLIBC_TUNABLES=glibc.cpu.hwcaps=-FMA,-AVX2,-FMA4 "$folder/venv/bin/python" "$folder/step.py")"
printf 'as it is    %s\nonce more   %s\nwithout FMA %s\n' "$first" "$second" "$hidden"
"$folder/venv/bin/python" - "$first" "$second" "$hidden" <<'PY'
import sys

first, second, hidden = ([float.fromhex(number) for number in text.split()] for text in sys.argv[1:])
assert first == second, "two processes differ now"
apart = max(abs(a - b) for a, b in zip(first, hidden))
print("largest difference", apart)
assert apart > 1e-3, "the trajectories are alike now"
PY
