"""A Llama-shaped model of 1.1 billion random weights, pruned from its folder to a folder: seconds and peak memory.

    python benchmarks/large_model.py --solvers magnitude column-sweep
    python benchmarks/large_model.py --part one-block --solvers fast
    python benchmarks/large_model.py --part plan

The model is made here (22 blocks, width 2048, MLP 5632, bf16) and removed afterwards, unless --folder says where it is.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

SHAPES = {
    "1.1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
             "num_key_value_heads": 4, "vocab_size": 32000},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32000},
    "width-1024": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16,
                   "num_key_value_heads": 4, "vocab_size": 8000},
    "width-512": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8,
                  "num_key_value_heads": 4, "vocab_size": 4000},
    "small": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 8,
              "num_key_value_heads": 4, "vocab_size": 1000},
}  # fmt: skip


def made(folder, shape, weights=True):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        config = LlamaConfig(**SHAPES[shape], max_position_embeddings=2048, tie_word_embeddings=False)
        if weights:
            LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="500MB")
        else:
            config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
            config.save_pretrained(folder)
    finally:
        torch.set_default_dtype(torch.float32)


def command(folder, out, solver, arguments, more=()):
    ids = np.random.default_rng(0).integers(
        0, SHAPES[arguments.shape]["vocab_size"], (arguments.windows, arguments.length)
    )
    np.savez(Path(out).parent / "ids.npz", input_ids=ids)
    return [
        sys.executable, "-m", "convexprune", "prune", str(folder), "--calibration", str(Path(out).parent / "ids.npz"),
        "--out", str(out), "--sparsity", "0.5", "--solver", solver, "--mode", arguments.mode, "--ignore", "lm_head",
        "--batch", str(arguments.batch), *more,
    ]  # fmt: skip


def run(words):
    begun = time.perf_counter()
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)  # of this process alone
        process.returncode = os.waitstatus_to_exitcode(status)
        file.seek(0)
        return process.returncode, time.perf_counter() - begun, usage.ru_maxrss * 1024 / 1e9, file.read()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=["whole", "one-block", "plan"], default="whole")
    parser.add_argument("--shape", choices=SHAPES, default="1.1B")
    parser.add_argument("--solvers", nargs="+", default=["magnitude", "column-sweep"])
    parser.add_argument("--mode", default="cascade")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary) / "model"
        if not folder.exists():
            made(folder, arguments.shape, arguments.part != "plan")
        more = {"whole": [], "one-block": ["--only", "model.layers.10.*"], "plan": ["--dry-run"]}[arguments.part]
        for solver in arguments.solvers:
            words = command(folder, Path(temporary) / solver, solver, arguments, more)
            status, seconds, gigabytes, output = run(words)
            if status:
                raise SystemExit(output)
            if arguments.part == "plan":
                print(output)
                continue
            plan = next(line for line in output.splitlines() if "at the peak" in line)
            what = f"{arguments.shape} {arguments.part} {arguments.mode} {solver}"
            print(f"{what}: {seconds:.0f} s, peak {gigabytes:.2f} GB")
            print(f"    planned {plan}")
            report = Path(temporary) / solver / "report.json"
            if report.exists():
                content = json.loads(report.read_text())
                print(f"    kept {content['kept']} of {content['total']}, {len(content['rows'])} rows")


if __name__ == "__main__":
    main()
