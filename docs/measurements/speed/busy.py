#!/usr/bin/env python3
"""How busy GPUs and processes are.

    busy.py OUT           one look each 2 s until it is ended: use and power of each GPU, CPU time of the processes of vLLM and millrace
    busy.py OUT RECORD    the means over the warm time of each run of RECORD: use in %, power in W, cores

Processes are those of this machine whose command holds vllm or millrace: let nothing else run there.
"""
import json, os, subprocess, sys, time


def gpus():
    try:
        text = subprocess.run(["nvidia-smi", "--query-gpu=index,utilization.gpu,power.draw", "--format=csv,noheader,nounits"],
                              capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return
    for l in text.splitlines():
        index, busy, power = l.split(", ")
        yield "GPU " + index, busy, power


def processes():
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = open(f"/proc/{pid}/cmdline", "rb").read().decode("utf-8", "replace").split("\0")
            stat = open(f"/proc/{pid}/stat").read()
        except OSError:
            continue
        whole, program = " ".join(command).lower(), os.path.basename(command[0])
        if int(pid) == os.getpid() or program in ("bash", "sh", "timeout") or "vllm" not in whole and program != "millrace":
            continue
        name = "EngineCore" if "enginecore" in whole else "millrace" if program == "millrace" else "frontend"
        user, system = stat[stat.rindex(")") + 2:].split()[11:13]
        yield name, pid, (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def watch(out):
    with open(out, "w", buffering=1) as f:
        while True:
            for row in [*gpus(), *processes()]:
                f.write(",".join(map(str, (round(time.time(), 1), *row))) + "\n")
            time.sleep(2)


def means(looks, record):
    rows = [l.strip().split(",") for l in open(looks)]
    for l in open(record):
        r = json.loads(l)
        inside = [x for x in rows if r["begin"] <= float(x[0]) <= r["begin"] + r["warm_s"]]
        print(r["label"], r["job"], end=":")
        for gpu in sorted({x[1] for x in inside if x[1].startswith("GPU")}):
            of = [(float(x[2]), float(x[3])) for x in inside if x[1] == gpu]
            print(f" {gpu} {sum(b for b, _ in of) / len(of):.0f} % {sum(p for _, p in of) / len(of):.0f} W", end=",")
        for name in sorted({x[1] for x in inside if not x[1].startswith("GPU")}):
            cores = 0
            for pid in {x[2] for x in inside if x[1] == name}:
                of = [(float(x[0]), float(x[3])) for x in inside if x[1] == name and x[2] == pid]
                cores += (of[-1][1] - of[0][1]) / max(of[-1][0] - of[0][0], 1)
            print(f" {name} {cores:.2f}", end="")
        print()


if __name__ == "__main__":
    watch(sys.argv[1]) if len(sys.argv) == 2 else means(*sys.argv[1:])
