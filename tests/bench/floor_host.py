"""The floor of the host path: torch's own cast copy of a Llama's weights, nothing else.

Copies every tensor of a Llama with about 268 million parameters from float32 (1 GiB) into an
existing bfloat16 tensor of the same shape (0.5 GiB) with `Tensor.copy_` and a fixed number of
threads. Source and destination are allocated, written and warmed before the clock starts. No
redistribution, no merging, no verification: whatever moves the same bytes can hardly do less.

This file is a yardstick. It is committed before the path that it judges and stays as it is.

    python tests/bench/floor_host.py                  # shared memory, two threads, JSON on stdout
    python tests/bench/floor_host.py --memory plain --rounds 15

Output, one JSON object:
    seconds       median wall time of one round over all tensors, in seconds
    bytes_read    bytes of the float32 sources
    bytes_landed  bytes of the bfloat16 destinations
    definition    what was timed, in words
and the machine facts and every round's time beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import Dict, List, Tuple

import torch

VOCAB = 32000
HIDDEN = 1024
INTERMEDIATE = 2816
LAYERS = 17
HEADS = 16
KV_HEADS = 8
HEAD_DIM = 64

DEFINITION = (
    "median over rounds of the wall time to run dst.copy_(src) once for every tensor: float32 -> "
    "bfloat16, contiguous, whole tensors, memory allocated and touched beforehand"
)


def llama_shapes() -> List[Tuple[str, Tuple[int, ...]]]:
    """Returns (Hugging Face name, shape in elements) of every tensor, in checkpoint order.

    Linear weights are [out features, in features]. The head is not tied.
    """
    shapes: List[Tuple[str, Tuple[int, ...]]] = [("model.embed_tokens.weight", (VOCAB, HIDDEN))]
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes += [
            (prefix + "self_attn.q_proj.weight", (HEADS * HEAD_DIM, HIDDEN)),
            (prefix + "self_attn.k_proj.weight", (KV_HEADS * HEAD_DIM, HIDDEN)),
            (prefix + "self_attn.v_proj.weight", (KV_HEADS * HEAD_DIM, HIDDEN)),
            (prefix + "self_attn.o_proj.weight", (HIDDEN, HEADS * HEAD_DIM)),
            (prefix + "mlp.gate_proj.weight", (INTERMEDIATE, HIDDEN)),
            (prefix + "mlp.up_proj.weight", (INTERMEDIATE, HIDDEN)),
            (prefix + "mlp.down_proj.weight", (HIDDEN, INTERMEDIATE)),
            (prefix + "input_layernorm.weight", (HIDDEN,)),
            (prefix + "post_attention_layernorm.weight", (HIDDEN,)),
        ]
    shapes += [("model.norm.weight", (HIDDEN,)), ("lm_head.weight", (VOCAB, HIDDEN))]
    return shapes


def machine_facts() -> Dict[str, object]:
    """Returns what a reader needs to compare two runs: CPU model, cores, torch version."""
    model = "unknown"
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0],
    }


def make_tensors(
    dtype: torch.dtype, shared: bool, random: bool
) -> List[Tuple[str, torch.Tensor]]:
    """Returns (name, tensor) for every shape, every page touched.

    `shared` puts each storage into shared memory. `random` fills with normal values of standard
    deviation 0.02, else with zeros.
    """
    tensors: List[Tuple[str, torch.Tensor]] = []
    for name, shape in llama_shapes():
        tensor = torch.empty(shape, dtype=dtype)
        if shared:
            tensor.share_memory_()
        if random:
            tensor.normal_(0.0, 0.02)
        else:
            tensor.zero_()
        tensors.append((name, tensor))
    return tensors


def measure(threads: int, rounds: int, warmup: int, shared: bool) -> Dict[str, object]:
    """Times the copy and returns the JSON object described at the top of this file."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    sources = [tensor for _, tensor in make_tensors(torch.float32, shared, random=True)]
    targets = [tensor for _, tensor in make_tensors(torch.bfloat16, shared, random=False)]
    seconds: List[float] = []
    for turn in range(warmup + rounds):
        begin = time.perf_counter()
        for target, source in zip(targets, sources):
            target.copy_(source)
        if turn >= warmup:
            seconds.append(time.perf_counter() - begin)
    return {
        "seconds": statistics.median(seconds),
        "bytes_read": sum(tensor.nbytes for tensor in sources),
        "bytes_landed": sum(tensor.nbytes for tensor in targets),
        "definition": DEFINITION,
        "best_seconds": min(seconds),
        "rounds": seconds,
        "threads": threads,
        "memory": "shared" if shared else "plain",
        "machine": machine_facts(),
    }


def main() -> None:
    """Parses the command line, measures, prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds, at least 7")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before the clock")
    parser.add_argument("--memory", choices=("shared", "plain"), default="shared")
    arguments = parser.parse_args()
    if arguments.rounds < 7:
        parser.error("--rounds must be at least 7 so that the median means something")
    report = measure(
        arguments.threads, arguments.rounds, arguments.warmup, arguments.memory == "shared"
    )
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
