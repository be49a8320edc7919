"""The command line: ``lightning-vlm fit|validate|test|predict|check|plan|...``, a LightningCLI without sharp edges.

Abbreviated options are errors, unknown keys get a suggestion, each run folder keeps its config, W&B works logged in,
logged out and absent, and wrong data ends in one sentence instead of a traceback.
"""

from __future__ import annotations

import difflib
import os
import re
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from lightning_vlm.callbacks.adapter_check import AdapterError
from lightning_vlm.callbacks.predictions import PredictionTable
from lightning_vlm.callbacks.throughput import Throughput
from lightning_vlm.callbacks.trainable_check import TrainableError
from lightning_vlm.commands.check import check_data
from lightning_vlm.commands.describe import planned_network, print_description
from lightning_vlm.commands.doctor import examine
from lightning_vlm.commands.export import export
from lightning_vlm.commands.memory import plan_memory
from lightning_vlm.commands.memory_report import print_memory
from lightning_vlm.commands.plan import planned_ranks, print_plan
from lightning_vlm.commands.preview import print_preview
from lightning_vlm.commands.quiet import quiet_other_libraries
from lightning_vlm.commands.refusals import is_refusal
from lightning_vlm.commands.run_loggers import usable_loggers
from lightning_vlm.datamodule import VLMDataModule
from lightning_vlm.module import NemotronVLModule
from lightning_vlm.schema import DataError
from lightning_vlm.training.isolation import IsolationError

_SUBCOMMANDS = ("fit", "validate", "test", "predict", "check", "preview", "plan", "describe", "doctor")
_WITHOUT_TRAINER = ("check", "preview", "plan", "describe", "doctor")
_UNKNOWN = re.compile(
    r"unrecognized arguments: -*(?P<a>[\w.\-]+)"
    r"|Option '(?P<b>[^']+)' is not accepted"
    r"|Group '(?P<group>[^']*)' does not accept option '(?P<c>[^']+)'"
    r"|Subcommand '\w+' does not accept option '(?P<e>[^']+)'"
    r"|No action for (?:destination )?key \"?(?P<d>[\w.]+)"
)


class VLMArgumentParser(LightningArgumentParser):
    """A parser that suggests the key that was probably meant."""

    def error(self, message: str, ex: Exception | None = None) -> None:
        """Prints the error with a suggestion and exits with 2."""
        super().error(message + suggest(message, list(self._known_keys())), ex)

    def _known_keys(self) -> Iterator[str]:
        for action in self._actions:
            yield action.dest
            for parser in getattr(action, "_name_parser_map", {}).values():
                yield from (inner.dest for inner in parser._actions)


def suggest(message: str, known: list[str]) -> str:
    """A sentence that names the closest known key.

    Args:
        message: A parser error.
        known: All dotted keys.

    Returns:
        The sentence, or nothing when no unknown key is in the message or none is close.
    """
    match = _UNKNOWN.search(message)
    if match is None:
        return ""
    found = next(match[name] for name in ("a", "b", "c", "d", "e") if match[name])
    wanted = f"{match['group']}.{found}" if match["group"] else found
    last_parts = {key.rpartition(".")[2]: key for key in known}
    close = difflib.get_close_matches(wanted, known, n=1, cutoff=0.7)
    if not close:
        close = [last_parts[key] for key in difflib.get_close_matches(found.rpartition(".")[2], last_parts, 1, 0.6)]
    return f" Did you mean '{close[0]}'?" if close else ""


class RunConfig(SaveConfigCallback):
    """Keeps the config in the run folder; an earlier, different one is renamed, never overwritten."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Writes ``config.yaml`` (fit) or ``config_<command>.yaml``."""
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        name = getattr(stage, "value", stage)  # Lightning passes an enum, whose f-string is its Python name
        path = folder / ("config.yaml" if name == "fit" else f"config_{name}.yaml")
        text = self.parser.dump(self.config, skip_none=False)
        if path.exists() and (earlier := path.read_text(encoding="utf-8")) != text:
            number = next(n for n in range(1, 10_000) if not path.with_suffix(f".{n}.yaml").exists())
            path.with_suffix(f".{number}.yaml").write_text(earlier, encoding="utf-8")
        path.write_text(text, encoding="utf-8")


class VLMTrainer(L.Trainer):
    """Lightning's Trainer; names the further commands and their options for the parser."""

    def check(self, examples: int = 3) -> None:
        """Reads all data, says what is in it and all that is wrong with it.

        Args:
            examples: Errors of each kind that are written out.
        """

    def preview(
        self,
        count: int = 5,
        split: Literal["train", "val", "test", "predict"] = "train",
        page: str = "preview.html",
        indices: list[int] | None = None,
        source: str | None = None,
    ) -> None:
        """Shows samples as the model gets them: text, trained or not, tokens and images; printed and as a page.

        Args:
            count: How many (-n): the first ones in the order in which training takes them.
            split: Which data.
            page: HTML file to write, in trainer.default_root_dir unless it is absolute; empty for none.
            indices: These samples instead, by their numbers in the split, e.g. [3,17].
            source: Those of this place instead, e.g. rows.jsonl:12.
        """

    def plan(self, ranks: int | None = None, picture: str = "plan.png", gpu_memory: float | None = None) -> None:
        """Prints what an epoch of training consists of, and draws it; or what memory training takes.

        Args:
            ranks: Data-parallel ranks to plan for; from trainer.devices and num_nodes by default.
            picture: PNG file to draw, in trainer.default_root_dir unless it is absolute; empty for none.
            gpu_memory: GiB of a device, for --memory; those of this machine's GPU, or 80, by default.
        """

    def describe(self, save: str | None = None) -> None:
        """Prints what the model consists of, trainable or frozen, and its memory; no weights are read or allocated.

        Args:
            save: File to write the same text to.
        """

    def doctor(self) -> None:
        """Tells which kernels run here and why, and proves that packed documents are isolated."""


class VLMCLI(LightningCLI):
    """LightningCLI for this package's module and datamodule.

    Attributes:
        exit_code: What the command ends with.
    """

    exit_code = 0

    def __init__(self, args: Any = None, run: bool = True) -> None:
        strict: dict[str, Any] = {"allow_abbrev": False, "parser_mode": "yaml"}
        # jsonargparse overwrites a subcommand's allow_abbrev with the top level's: both are set.
        # A dict for each: LightningCLI writes the subcommand's description into it.
        parser_kwargs = {**strict, **{name: dict(strict) for name in _SUBCOMMANDS}} if run else dict(strict)
        parser_kwargs["epilog"] = "Besides: lightning-vlm export RUN OUT, without a config; lightning-vlm export -h."
        super().__init__(
            NemotronVLModule,
            VLMDataModule,
            trainer_class=VLMTrainer,
            parser_class=VLMArgumentParser,
            parser_kwargs=parser_kwargs,
            save_config_callback=RunConfig,
            auto_configure_optimizers=False,
            seed_everything_default=42,
            args=args,
            run=run,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """LightningCLI's own, and those that look before a run."""
        return {**LightningCLI.subcommands(), **{name: set() for name in _WITHOUT_TRAINER}}

    def _set_seed(self) -> None:
        """Seeds; says so only where the seed decides something: what looks at a run trains nothing."""
        seed = self.config[self.subcommand].seed_everything if self.subcommand in _WITHOUT_TRAINER else True
        if seed is True:  # a seed to be chosen is always told
            super()._set_seed()
        elif seed is not False:
            L.seed_everything(seed, workers=True, verbose=False)

    def _parse_ckpt_path(self) -> None:
        """Keeps the config as the user gave it; LightningCLI would replace it by the checkpoint's hyperparameters."""

    def before_instantiate_classes(self) -> None:
        """Fills in what follows from something else in the config."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        if config.data.processor is None:
            config.data.processor = config.model.model_id
        if self.subcommand not in _WITHOUT_TRAINER:
            config.trainer.logger = usable_loggers(config.trainer.logger, config.trainer.default_root_dir or ".")

    def instantiate_classes(self) -> None:
        """Ends wrong settings in one sentence and exit code 2."""
        try:
            if self.subcommand == "describe":  # of the data, nothing need be there
                config = self.config.describe
                self.model = planned_network(config.model.as_dict(), config.trainer.precision)
            elif self.subcommand == "plan" and self.config.plan.memory:
                self.memory = plan_memory(self.config.plan)
            elif self.subcommand in _WITHOUT_TRAINER:  # a laptop may plan for machines that it has not
                self.datamodule = VLMDataModule(**self.config[self.subcommand].data.as_dict())
            else:
                super().instantiate_classes()
        except DataError:  # a problem in what settings name, not in the settings
            raise
        except (ValueError, NotImplementedError, MisconfigurationException) as error:
            _tell(error)
            raise SystemExit(2) from error

    def _prepare_subcommand_parser(self, klass: Any, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "check":  # flags that take no value, which parameters of a method cannot be
            parser.add_argument("--decode", action="store_true", help="Read media in full, not their headers alone.")
            parser.add_argument("--json", action="store_true", help="Print one JSON object with all errors.")
        if subcommand == "describe":
            parser.add_argument("--detailed", action="store_true", help="Also print the layers inside the parts.")
            parser.add_argument("--json", action="store_true", help="Print one JSON object with all numbers.")
        if subcommand == "plan":
            parser.add_argument("--memory", action="store_true", help="Print the memory of each rank instead.")
            parser.add_argument("--json", action="store_true", help="With --memory: one JSON object.")
        if subcommand == "preview":
            parser._option_string_actions["-n"] = parser._option_string_actions["--count"]
        return parser

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand == "doctor":
            self.exit_code = 0 if examine() else 1
        elif subcommand == "check":
            config = self.config.check
            self.exit_code = 0 if check_data(self.datamodule, config.decode, config.json, config.examples) else 1
        elif subcommand == "preview":
            config = self.config.preview
            page = Path(config.trainer.default_root_dir or ".", config.page) if config.page else None
            shown = print_preview(self.datamodule, config.count, config.split, page, config.indices, config.source)
            self.exit_code = 0 if shown else 1
        elif subcommand == "describe":
            config = self.config.describe
            options = (config.detailed, config.json, config.save, config.model.optimizer)
            print_description(self.model, config.trainer.precision, *options)
        elif subcommand == "plan" and self.config.plan.memory:
            self.exit_code = print_memory(self.memory, self.config.plan.json)
        elif subcommand == "plan":
            config = self.config.plan
            ranks = config.ranks or planned_ranks(config.trainer) or 1
            picture = Path(config.trainer.default_root_dir or ".", config.picture) if config.picture else None
            print_plan(self.datamodule, ranks, config.trainer.accumulate_grad_batches, picture)
        else:
            super()._run_subcommand(subcommand)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Adds the prediction table and the throughput watcher unless configured."""
        trainer = super().instantiate_trainer(**kwargs)
        for kind in (PredictionTable, Throughput):
            if not any(isinstance(callback, kind) for callback in trainer.callbacks):
                trainer.callbacks.append(kind())
        return trainer


def main(args: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
        args: Arguments; those of the process by default.

    Returns:
        Exit code: 0 good, 1 a problem in data or model, 2 wrong use, 141 nobody reads on, 143 stopped by SIGTERM.
    """
    quiet_other_libraries()
    try:
        try:
            return _run(args)
        finally:
            sys.stdout.flush()  # here, where it can be answered for: Python would do it after the end
    except BrokenPipeError:
        if not _lost_its_reader():
            raise
        return 128 + signal.SIGPIPE


def _run(args: list[str] | None) -> int:
    given = sys.argv[1:] if args is None else args
    try:
        if given[:1] == ["export"]:  # of a checkpoint, which knows its run: it takes no config
            return export(given[1:])
        return VLMCLI(args).exit_code
    except (DataError, IsolationError, TrainableError, AdapterError) as error:
        _tell(error)
        return 1
    except ImportError as error:
        if "lightning-vlm[" not in str(error):  # else an extra of ours is not installed
            raise
        _tell(error)
        return 1
    except (ValueError, NotImplementedError, TypeError) as error:
        if not is_refusal(error):
            raise
        _tell(error)
        return 2
    except SIGTERMException:
        print("stopped by SIGTERM; continue with --ckpt_path last", file=sys.stderr)
        return 128 + signal.SIGTERM


def _tell(error: BaseException) -> None:
    sys.stderr.write(f"error: {error}\n")  # one piece: other ranks write there too


def _lost_its_reader() -> bool:
    """Whether stdout is a pipe that nobody reads any more, as behind ``| head``; it leads nowhere from then on.

    Python ignores the signal that ends other programs then, and should: a run writes into other pipes too.
    """
    try:
        stdout = sys.stdout.fileno()
    except OSError:  # no file at all: a notebook's, or a test's
        return False
    ends = select.poll()
    ends.register(stdout, 0)  # that it is broken is told unasked
    if not ends.poll(0):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stdout)
    os.close(nowhere)
    return True


if __name__ == "__main__":
    sys.exit(main())
