"""What each of two processes does; tests/train/test_distributed.py starts it with torchrun."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from ismdata.attention.attachment import attach
from ismdata.data.dataset import PackedDataset
from ismdata.errors import Terminated, UsageError
from ismdata.train.collate import TrainingCollator
from ismdata.train.loss import COUNTS, LOSS_ITEMS, compute_loss_at_targets, take_counts
from tests.support.reporters import Recorder
from tests.support.tiny import tiny_model
from tests.support.training_shards import Listener, run

#: Runs by name; test_distributed.py compares each with the same run in one process.
RUNS = {
    "one micro-batch": {"batch_size": 4},
    "four micro-batches": {"batch_size": 1, "global_batch": 8},
    "answers": {"batch_size": 1, "global_batch": 8, "loss_weighting": "answer"},
}
COMMON = {"steps": None, "epochs": 1.5, "learning_rate": 3e-3, "warmup": 1, "log_every": 1, "save_every": 2}


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    reporter = Recorder()
    packed, model = folder / "packed", str(folder / "model")
    for name, options in RUNS.items():
        run(packed, folder / "two" / name, model=model, reporter=reporter, **COMMON, **options)

    # An error on one process is raised on both.
    try:
        run(packed, folder / "in use", model=model, **COMMON)
    except UsageError as error:
        (folder / f"refused-{rank}").write_text(str(error))

    # One process gets a signal and both stop after the same step; a test resumes the run on one process.
    def signalled(line: str) -> None:
        if line.startswith("step 1/"):
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        run(
            packed,
            folder / "stopped",
            model=model,
            reporter=Listener(signalled),
            **COMMON,
            batch_size=1,
            global_batch=8,
        )
    except Terminated:
        (folder / f"stopped-{rank}").touch()

    (folder / f"notes-{rank}.json").write_text(json.dumps(reporter.notes))
    fully_sharded(folder, rank)
    dist.barrier()
    dist.destroy_process_group()


def fully_sharded(folder: Path, rank: int) -> None:
    """Save one step's loss and gradients with torch's FSDP2, half of the rows on each process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    model = attach(tiny_model(dtype=torch.float32))
    assert compute_loss_at_targets(model)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    dataset = PackedDataset(folder / "packed")
    collator = TrainingCollator("ism", "answer")
    batch = collator([dataset[row] for row in range(rank * 2, rank * 2 + 2)])
    items = take_counts(batch)[COUNTS.index(LOSS_ITEMS)]
    dist.all_reduce(items)
    loss = model(**batch, num_items_in_batch=items).loss
    mean = torch.zeros(1)  # of two ones: FSDP2 asks for the mean of gradients, and gloo of torch 2.8 gives the sum
    dist.reduce_scatter_tensor(mean, torch.ones(2), op=dist.ReduceOp.AVG)
    (loss * 2 / mean.item()).backward()
    dist.all_reduce(loss.detach_())
    gradients = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    if rank == 0:
        torch.save({"loss": loss, "gradients": gradients}, folder / "fsdp.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
