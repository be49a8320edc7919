"""The loss head: full logits (as transformers computes them) beside ours, in one run.

    python benchmarks/loss_head.py

Each way runs in its own process, forward and backward, on the same random hidden states; one labelled token in ten, as
in image conversations. Time is the best of three, memory the process's peak above its state before the loss.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

WAYS = {
    "transformers (all logits)": "full",
    "ours (labelled rows, chunks of 1024)": "ours",
}


def measure(way: str, tokens: int, width: int, vocabulary: int) -> dict[str, float]:
    """Runs one way in this process."""
    import torch
    from transformers.loss.loss_utils import ForCausalLMLoss

    from lightning_vlm.ops.cross_entropy import linear_cross_entropy, shift_labels

    torch.manual_seed(0)
    head = torch.nn.Linear(width, vocabulary, bias=False)
    hidden = torch.randn(1, tokens, width, requires_grad=True)
    labels = torch.randint(vocabulary, (1, tokens))
    labels[torch.rand(1, tokens) > 0.1] = -100
    count = int((shift_labels(labels) != -100).sum())

    def run() -> float:
        hidden.grad = head.weight.grad = None
        if way == "full":
            loss = ForCausalLMLoss(head(hidden), labels, vocabulary)
        else:
            loss = linear_cross_entropy(hidden, head, shift_labels(labels)) / count
        loss.backward()
        return float(loss.detach())

    head.weight.grad = torch.zeros_like(head.weight)  # the gradient itself is not the loss head's cost
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        loss = run()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"loss": loss, "seconds": min(seconds), "mib": (peak - before) / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--way", choices=WAYS.values(), help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = ["--tokens", str(options.tokens), "--width", str(options.width), "--vocabulary", str(options.vocabulary)]
    if options.way:
        print(json.dumps(measure(options.way, options.tokens, options.width, options.vocabulary)))
        return

    results = {}
    for name, way in WAYS.items():
        command = [sys.executable, __file__, *sizes, "--way", way]
        results[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(
        f"{options.tokens} tokens, 10 % labelled, width {options.width}, vocabulary {options.vocabulary}, fp32 on CPU"
    )
    print(f"{'':38} {'seconds':>8} {'ratio':>6} {'peak MiB':>9} {'ratio':>6} {'loss':>9}")
    base = next(iter(results.values()))
    for name, result in results.items():
        print(
            f"{name:38} {result['seconds']:8.2f} {result['seconds'] / base['seconds']:6.2f} {result['mib']:9.0f} "
            f"{result['mib'] / base['mib']:6.2f} {result['loss']:9.5f}"
        )


if __name__ == "__main__":
    main()
