"""What can be said on the command line and in a configuration file: one table for both."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cotnet_ext.cli.command import UsageError, require, whole

PROGRAM = "train.py"


def _number(least: float, most: float | None = None) -> Callable[[str], float]:
    expected = f"a number >= {least:g}" + ("" if most is None else f" and <= {most:g}")

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = None
        # Written so that NaN fails.
        if value is None or not (value >= least and (most is None or value <= most)):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


def _pair(part: Callable[[str], float]) -> Callable[[str], tuple[float, float]]:
    def parse(text: str) -> tuple[float, float]:
        parts = [part(word) for word in text.split(",")]
        if len(parts) != 2 or parts[0] > parts[1]:
            raise argparse.ArgumentTypeError(f"expected LEAST,MOST, got {text!r}")
        return parts[0], parts[1]

    return parse


def _choice(*names: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"expected {', '.join(names)}, got {text!r}")
        return text

    return parse


def _or_none(part: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text == "none" else part(text)


def _option(default: Any, parse: Callable[[str], Any] | None, help: str) -> Any:
    """A field of `Options`; `parse` reads its text, None for a switch."""
    return dataclasses.field(default=default, metadata={"parse": parse, "help": help})


_share = _number(0, 1)
_positive = whole(1)
LAYERS = ("CotLayer", "CoXtLayer", "CoTAttention")
DIGITS, DIGITNET = "digits", "digitnet"


@dataclass(frozen=True)
class Options:
    """Every field is an option `--like-this` and a key `like_this` of a configuration file."""

    # The run
    out: str = _option("training_output", str, "folder for checkpoints and logs")
    resume: bool = _option(False, None, "go on from OUT/last.pt when there is one")
    seed: int = _option(42, whole(0, 2**32 - 1), "random seed")
    device: str = _option("auto", _choice("auto", "cpu", "cuda"), "auto: cuda where there is one")
    threads: int | None = _option(None, _or_none(_positive), "CPU threads of each process")
    tensorboard: bool = _option(True, None, "write OUT/tensorboard beside OUT/log.csv")
    log_interval: int = _option(50, _positive, "steps between two entries of the loss")

    # Data
    data: str = _option(DIGITS, str, "'digits', or a folder with train/CLASS/ and val/CLASS/")
    batch_size: int = _option(64, _positive, "images per process and forward pass")
    eval_batch_size: int = _option(128, _positive, "the same in the evaluation")
    workers: int = _option(4, whole(0), "processes that load images, for each that trains")
    image_size: int = _option(224, _positive, "side of the images, for folders")
    crop_pct: float = _option(0.875, _number(0.01, 1), "share of the image that evaluation sees")
    interpolation: str = _option("bicubic", str, "how images are resized")

    # Network
    model: str = _option(DIGITNET, str, "'digitnet' or a name of cotnet_ext.models.list_models()")
    layer: str = _option("CotLayer", _choice(*LAYERS), "the layer that a digitnet consists of")
    width: int = _option(32, _positive, "channels of a digitnet")
    depth: int = _option(2, _positive, "layers of a digitnet")
    reference: bool = _option(False, None, "train the reference layers in place of the fused ones")
    num_classes: int | None = _option(None, _or_none(_positive), "none: as many as the data has")
    checkpoint: str | None = _option(None, _or_none(str), "file of weights to start from")
    drop: float = _option(0.0, _share, "dropout before the classifier")
    drop_path: float = _option(0.0, _share, "stochastic depth")

    # Augmentation
    scale: tuple[float, float] = _option((0.08, 1.0), _pair(_share), "share of an image cut out")
    ratio: tuple[float, float] = _option((3 / 4, 4 / 3), _pair(_number(0.01)), "its aspect")
    hflip: float = _option(0.5, _share, "probability of a horizontal flip")
    vflip: float = _option(0.0, _share, "probability of a vertical flip")
    color_jitter: float = _option(0.4, _number(0), "strength of the colour jitter")
    aa: str | None = _option(None, _or_none(str), "RandAugment or AutoAugment, in timm's words")
    reprob: float = _option(0.0, _share, "probability of random erasing")
    remode: str = _option("pixel", _choice("const", "rand", "pixel"), "what it fills in")
    recount: int = _option(1, _positive, "most rectangles erased in an image")
    mixup: float = _option(0.0, _number(0), "alpha of mixup, 0 for none")
    cutmix: float = _option(0.0, _number(0), "alpha of cutmix, 0 for none")
    mixup_prob: float = _option(1.0, _share, "probability that a batch is mixed")
    mixup_switch_prob: float = _option(0.5, _share, "probability of cutmix where both are on")
    mixup_mode: str = _option("batch", _choice("batch", "pair", "elem"), "what shares a mixture")
    mixup_off_epoch: int = _option(0, whole(0), "epoch from which nothing is mixed, 0 for never")
    smoothing: float = _option(0.0, _number(0, 0.999), "label smoothing")

    # Optimisation
    epochs: int = _option(30, _positive, "epochs in all")
    opt: str = _option("sgd", str, "optimiser, by timm's name; sgd has Nesterov's momentum")
    lr: float = _option(0.05, _number(0), "peak learning rate")
    base_batch: int | None = _option(
        None, _or_none(_positive), "images per update that lr is meant for; scales it for others"
    )
    momentum: float = _option(0.9, _share, "momentum")
    weight_decay: float = _option(5e-4, _number(0), "weight decay, not of norms and biases")
    warmup_epochs: int = _option(0, whole(0), "epochs in which the rate grows")
    warmup_lr: float = _option(1e-4, _number(0), "rate at the start of the warm-up")
    min_lr: float = _option(1e-5, _number(0), "rate at the end of the cosine")
    cooldown_epochs: int = _option(0, whole(0), "epochs at min_lr after the cosine")
    sched_on_updates: bool = _option(False, None, "change the rate every step, not every epoch")
    accumulate: int = _option(1, _positive, "forward passes per update")
    clip_grad: float | None = _option(None, _or_none(_number(0)), "limit of the gradient")
    clip_mode: str = _option("norm", _choice("norm", "value", "agc"), "what is limited")
    ema: bool = _option(False, None, "keep an exponential average of the weights")
    ema_decay: float = _option(0.9999, _share, "its decay")
    ema_warmup: bool = _option(False, None, "let the decay grow, for short runs")

    # How it is computed
    amp: str = _option("none", _choice("none", "bfloat16", "float16"), "mixed precision")
    channels_last: bool = _option(False, None, "channels_last memory format")
    compile: str | None = _option(None, _or_none(str), "torch.compile with this backend")
    sync_bn: bool = _option(False, None, "batch norms over all processes")


FIELDS = {field.name: field for field in dataclasses.fields(Options)}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {PROGRAM} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description="Train a contextual transformer network; start it with torchrun for more than "
        "one process. Options win over the configuration file.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of options")
    for field in FIELDS.values():
        flag = "--" + field.name.replace("_", "-")
        parse, text = field.metadata["parse"], field.metadata["help"]
        text = f"{text} (default: {_spell(field.default)})".replace("%", "%%")
        if parse is None:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif field.name == "compile":
            parser.add_argument(flag, type=parse, nargs="?", const="inductor", help=text)
        else:
            parser.add_argument(flag, type=parse, help=text)
    return parser


def _spell(value: Any) -> str:
    """A value in the words in which it is given."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (tuple, list)):
        return ",".join(f"{part:g}" for part in value)
    return "none" if value is None else str(value)


def parse(arguments: Sequence[str] | None = None) -> Options:
    """The options of a command line (default: that of the process) and of its `--config`."""
    known, rest = _parser().parse_known_args(arguments)
    if rest:
        names = ["config", *FIELDS]
        nearest = _nearest(rest[0], names).replace("_", "-")
        raise UsageError(f"unknown option {rest[0]!r}; did you mean --{nearest}?")
    said = vars(known)
    path = said.pop("config", None)
    return Options(**{**(read_config(path) if path else {}), **said})


def read_config(path: str) -> dict[str, Any]:
    """The options in a YAML file, checked as those of the command line are."""
    require("train", "yaml")
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UsageError(f"--config: cannot read {path!r}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        raise UsageError(f"--config: {path!r} is no YAML: {first}") from None
    if not isinstance(content, dict):
        raise UsageError(f"--config: {path!r} must hold lines 'option: value'")
    return {str(key): _read_value(path, str(key), value) for key, value in content.items()}


def _read_value(path: str, key: str, value: Any) -> Any:
    if key not in FIELDS:
        raise UsageError(f"{path}: unknown option {key!r}; did you mean {_nearest(key, FIELDS)!r}?")
    parse = FIELDS[key].metadata["parse"]
    if parse is None:
        if not isinstance(value, bool):
            raise UsageError(f"{path}: {key}: expected true or false, got {value!r}")
        return value
    try:
        return parse(",".join(map(str, value)) if isinstance(value, list) else _spell(value))
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"{path}: {key}: {error}") from None


def _nearest(word: str, names: Iterable[str]) -> str:
    word = word.partition("=")[0].lstrip("-").replace("-", "_")
    return difflib.get_close_matches(word, list(names), n=1, cutoff=0)[0]


def check(options: Options) -> None:
    """Refuses what does not go together."""
    mixed = options.mixup > 0 or options.cutmix > 0
    if mixed and options.batch_size % 2:
        raise UsageError(f"--batch-size: mixup and cutmix need pairs, got {options.batch_size}")
    if options.warmup_epochs > options.epochs:
        raise UsageError(f"--warmup-epochs: more than the {options.epochs} epochs")
    if options.data == DIGITS and options.aa:
        raise UsageError("--aa: RandAugment works on images of folders, not on the digits")
    if options.model == DIGITNET:
        multiple = {"CotLayer": 8, "CoXtLayer": 16, "CoTAttention": 4}[options.layer]
        if options.width % multiple:
            raise UsageError(
                f"--width: a {options.layer} needs a multiple of {multiple}, got {options.width}"
            )
        if options.checkpoint:
            raise UsageError("--checkpoint: there are no weights for a digitnet to start from")
