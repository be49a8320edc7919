"""Trains a released folder for two steps, on one process or sharded by FSDP2 over two. Started as a script."""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from lightning_vlm import NemotronVLModule, VLMDataModule
from lightning_vlm.checkpoint.hf_import import import_weights
from lightning_vlm.checkpoint.opening import planned_model
from lightning_vlm.checkpoint.weight_files import WeightFiles
from lightning_vlm.training.freezing import freeze


class Sharded(NemotronVLModule):
    """Shards on the meta device, then reads the weights into the shards."""

    def configure_model(self) -> None:
        if self.model is not None:
            return
        folder = Path(self.hparams.model_id)
        files = WeightFiles(folder)
        model = planned_model(folder, files).train()
        freeze(model, [])
        for module in (*model.vision_model.encoder.layer, *model.language_model.model.layers, model):
            fully_shard(module, mesh=self.device_mesh["data_parallel"])
        import_weights(model, files)
        self.model = model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ranks", type=int, default=1)
    arguments = parser.parse_args()
    L.seed_everything(3, verbose=False)
    module = (Sharded if arguments.ranks > 1 else NemotronVLModule)(
        str(arguments.folder), lr=1e-2, warmup=0, generate_on_validation=False
    )
    data = VLMDataModule(
        train=str(arguments.rows),
        processor=str(arguments.folder),
        batch_size=4 // arguments.ranks,
        sampler="sequential",
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=arguments.ranks,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if arguments.ranks > 1 else "auto",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(arguments.out)


if __name__ == "__main__":
    main()
