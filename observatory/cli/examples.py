"""Two examples for each command, shown at the end of its help page."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "quickstart": ("observatory quickstart", "observatory quickstart --out demo"),
    "profile": (
        "observatory profile tiny-gqa --out runs/a",
        "observatory profile ./my-checkpoint --data prompts.txt --ep 4 --steps 8 --out runs/ep4",
    ),
    "run": (
        "observatory run --out runs/a -- python train.py",
        "observatory run --out runs/ep4 --steps 10:60 -- torchrun --nproc-per-node 4 train.py --lr 1e-4",
    ),
    "ctl": (
        "observatory ctl runs/a start",
        "observatory ctl runs/a mark 'second request'",
    ),
    "grid": (
        "observatory grid grid.toml --out runs/grid",
        "observatory grid grid.toml --out runs/grid --json",
    ),
    "routing": ("observatory routing runs/a", "observatory routing runs/a --csv > routing.csv"),
    "scan": (
        "observatory scan runs/a --ep 8,16 --gpus-per-node 4",
        "observatory scan runs/a --placement linear --placement my-placement.json --network fit.json",
    ),
    "place": (
        "observatory place runs/a --ranks 8 --replicas 8 --out placement.json",
        "observatory place --problem problem.npz --out placement.json",
    ),
    "route-fetch": (
        "observatory route-fetch --constants rf.json --layers 27",
        "observatory route-fetch --constants published:h100-ndr200 --shape mla:16,512,64 --layers 27",
    ),
    "advise": (
        "observatory advise runs/ep4 --network fit.json",
        "observatory advise runs/a --ranks 8 --gpus-per-node 4 --hardware h100-sxm --out advice.json",
    ),
    "compare": (
        "observatory compare runs/before runs/after",
        'observatory compare runs/before runs/after --fail-if "decode.ms>+3%"',
    ),
    "plan": (
        "observatory plan runs/a --target-tokens-per-s 20000 --context 4096 --output 512 --hardware h200-sxm",
        "observatory plan config.json --target-tokens-per-s 20000 --context 4096 --output 512 "
        "--max-ms-per-token 50 --hardware h200-sxm --hardware h20",
    ),
    "top": ("observatory top runs/a", "observatory top runs --once"),
    "metrics": (
        "observatory metrics runs/a --port 9464",
        "observatory metrics runs/a --textfile /var/lib/node_exporter/observatory.prom --interval 30",
    ),
    "check": (
        "observatory check runs/a --rules rules.toml",
        "observatory check runs/a --rules rules.toml --json",
    ),
    "history": ("observatory history runs/nightly", "observatory history runs/checkpoints --json"),
    "exchanges": ("observatory exchanges runs/ep4", "observatory exchanges runs/ep4 --csv --table ranks"),
    "bench alltoall": (
        "observatory bench alltoall --ranks 4 --out bench.json",
        "mpiexec -n 8 observatory bench alltoall --backend mpi --algorithm all --out bench.json",
    ),
    "bench experts": (
        "observatory bench experts tiny-gqa --ep 4 --out experts.json",
        "observatory bench experts --shape 2048,768,128,8 --ep 16 --dtype bfloat16 --out experts.json",
    ),
    "bench route-fetch": (
        "observatory bench route-fetch --shape mla:16,512,64 --out rf.json",
        "mpiexec -n 3 observatory bench route-fetch --backend mpi --shape expert:512 --out rf.json",
    ),
    "replay": (
        "observatory replay runs/ep4 --out replay.json",
        "observatory replay runs/a --ep 4 --phase prefill --steps 8 --out replay.json",
    ),
    "fit": (
        "observatory fit bench.json --out fit.json",
        "observatory fit bench-2.json bench-4.json --check replay.json --out fit.json",
    ),
    "import": (
        "observatory import nccl-tests alltoall.log --out measured  # then: observatory fit measured/*.json",
        "observatory import auto nvidia-smi.csv --utc-offset +01:00 --out runs/power",
    ),
    "export": (
        "observatory export runs/a nccl-tests --ep 8 --out matrices",
        "observatory export runs/ep4 chrome-trace --out trace.json.gz",
    ),
    "power": (
        "observatory power --out runs/power -- python train.py",
        "observatory power --device GPU-5ea1ed00 --seconds 60 --out runs/power",
    ),
    "energy": ("observatory energy runs/power", "observatory energy runs/power --reuse reuse.json --json"),
    "reuse measure": (
        "observatory reuse measure ./my-checkpoint --device GPU-5ea1ed00 --out reuse.json",
        "observatory reuse measure tiny-gqa --device rapl:package-0 --torch-device cpu --out reuse.json",
    ),
    "reuse show": ("observatory reuse show reuse.json", "observatory reuse show reuse.json --csv"),
    "clocks sweep": (
        "observatory clocks sweep --device GPU-5ea1ed00 --model tiny-gqa --out s.json",
        "observatory clocks sweep --device GPU-5ea1ed00 --out s.json -- ./decode",
    ),
    "clocks recover": (
        "observatory clocks recover sweep.points.jsonl --out sweep.json",
        "observatory clocks recover sweep.points.jsonl --out sweep.json --force",
    ),
    "clocks fit": (
        "observatory clocks fit sweep.json --out clocks.json",
        "observatory clocks fit at-1980.json at-1200.json --out clocks.json",
    ),
    "clocks recommend": (
        "observatory clocks recommend clocks.json --max-slowdown 0.05",
        "observatory clocks recommend --telemetry runs/power",
    ),
    "clocks status": ("observatory clocks status", "observatory clocks status --json"),
    "clocks unlock": ("observatory clocks unlock", "observatory clocks unlock --force"),
    "report": (
        "observatory report runs/a --out report.html",
        "observatory report runs/a runs/ep4 --ep 8,16 --bench bench.json --out report.html --force",
    ),
    "site init": (
        "observatory site init --out site.toml",
        "observatory site init --partition a100 --out site.toml",
    ),
    "site check": ("observatory site check site.toml", "observatory site check /home/ab12/site.toml"),
    "site example": (
        "observatory site example",
        "observatory site example observatory.def > observatory.def",
    ),
    "reduce": (
        "observatory reduce runs/a mixers --csv",
        "mpiexec -n 4 observatory reduce mixers --out metrics.json",
    ),
    "submit": (
        "observatory submit mixers.toml --site site.toml --dry-run",
        "observatory submit mixers.toml --site site.toml --array-limit 8",
    ),
    "jobs": ("observatory jobs mixers", "observatory jobs mixers --wait"),
    "collect": ("observatory collect mixers", "observatory collect mixers --report report.html"),
    "cancel": ("observatory cancel mixers", "observatory cancel /scratch/campaigns/mixers"),
    "doctor": (
        "observatory doctor --model ./my-checkpoint --verify",
        "observatory doctor --run runs/a",
    ),
}
