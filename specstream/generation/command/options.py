"""The options of `generate.py`: flags on the command line, keys in configs/generate/*.yaml."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from jsonargparse import Namespace
from torch import nn

from specstream.config_errors import ConfigError, OneLineErrors, constructor_refusal
from specstream.drafters import StoredDrafter
from specstream.generation.batch import Limits
from specstream.generation.command.canvas_options import CanvasOptions
from specstream.generation.command.media_options import SIZES, MediaOptions
from specstream.generation.lengths import CostModelLength, DraftLength, FixedLength
from specstream.generation.loading import Quantized, find_device, spread_devices
from specstream.generation.masked import Sampler
from specstream.generation.media_loading import is_media_run
from specstream.models.quantization import USUAL, Method
from specstream.sampling import Sampling
from specstream.verification import CanvasVerifier, TokenVerifier

SHARED = ("output", "batch_size")  # for files of prompts, and for media
WITHOUT_SECTION = (  # of media, by the names that they are known by elsewhere
    "height",
    "width",
    "num_frames",
    "draft_steps",
    "main_steps",
    "guidance",
    "refinement_threshold",
)
DTYPES = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Options:
    """What is decoded, with what, how, and what is shown of it.

    Args:
        run: a run folder, checkpoints/NAME; the models are its own.
        target: instead of a run, the model whose output is wanted (class_path and init_args):
            PretrainedLM, PretrainedMaskedLM or PretrainedDenoiser of specstream.models.
        drafter: who guesses for the target; none: plain decoding.
        verifier: which guesses stand; TokenRejection unless said, of a masked model
            ConfidenceThreshold.
        lengths: how many tokens are drafted in a round; CostModelLength unless said.
        draft_tokens: short for lengths: N tokens in every round, or auto, the cost model; of a
            masked diffusion model, denoising steps.
        lookup: also copy from the text so far, where a long n-gram recurs.
        prompt: the text to continue.
        prompts: a file of prompts (.jsonl, .jsonl.gz, .parquet), instead of one.
        template: how a record of that file becomes a prompt.
        limit: only the first so many prompts of that file.
        output: the .jsonl that gets the continuations, in the order of the prompts; of media, the
            .png, .mp4 or .wav.
        overwrite: replace an output, or statistics, that exist.
        devices: decode a file of prompts in so many processes, one for each device.
        batch_size: prompts decoded at once.
        max_new_tokens: a continuation is no longer.
        stop: a continuation ends before this string, or one of these.
        ignore_eos: go on after the end of sequence.
        temperature: of the law that is drawn from; 0 is greedy; 1 unless said, of a masked
            diffusion model 0.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the most probable tokens that add up to this.
        min_p: keep tokens at least this fraction as probable as the best.
        repetition_penalty: divide the score of tokens already in the text; 1 is off.
        seed: decides every draw.
        chat: put the prompt into the chat template of the tokenizer.
        dtype: of the weights; auto is bfloat16 where the hardware computes in it.
        device: auto, cpu, cuda or cuda:N.
        attn_implementation: sdpa, eager or another of transformers.
        compile: compile the passes with torch.compile, at the start of the first run.
        quantize: int8 weights for one of the models or both.
        quantize_method: int8_weight_only, or int8_dynamic, which rounds what comes in as well.
        show_drafts: colour tokens by where they came from.
        compare: also decode with the plain target, three times each, and report the speedup; of
            small models of media, samples without a law are held beside it unless false.
        canvas: options of masked diffusion models, `--canvas.steps 16`.
        media: options of diffusion models of media, `--media.steps 50`.
        stats: write the statistics as one JSON object to this file.
    """

    run: str | None = None
    target: Callable[[], nn.Module] | None = None
    drafter: Callable[[nn.Module], StoredDrafter] | None = None
    verifier: TokenVerifier | CanvasVerifier | None = None
    lengths: DraftLength | None = None
    draft_tokens: int | Literal["auto"] | None = None
    lookup: bool = False
    prompt: str | None = None
    prompts: str | None = None
    template: str = "{prompt}"
    limit: int | None = None
    output: str | None = None
    overwrite: bool = False
    devices: int = 1
    batch_size: int = 1
    max_new_tokens: int = 128
    stop: list[str] | str = field(default_factory=list)
    ignore_eos: bool = False
    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    chat: bool = False
    dtype: DTYPES | None = None
    device: str = "auto"
    attn_implementation: str | None = None
    compile: bool = False
    quantize: Quantized = "none"
    quantize_method: Method = USUAL
    show_drafts: bool = False
    compare: bool | None = None
    stats: str | None = None
    canvas: CanvasOptions = field(default_factory=CanvasOptions)
    media: MediaOptions = field(default_factory=MediaOptions)

    @property
    def sampling(self) -> Sampling:
        """The law that is drawn from."""
        return self._sampling(1.0)

    @property
    def sampler(self) -> Sampler:
        """How canvases of a masked diffusion model are filled."""
        return self.canvas.sampler(self._sampling(0.0), self.limits)

    def _sampling(self, temperature: float) -> Sampling:
        temperature = temperature if self.temperature is None else self.temperature
        return Sampling(temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)

    @property
    def limits(self) -> Limits:
        """Where a continuation ends."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        return Limits(self.max_new_tokens, stop, self.ignore_eos)

    @property
    def draft_length(self) -> DraftLength | None:
        """What `draft_tokens` says, else `lengths`."""
        if self.draft_tokens is None:
            return self.lengths
        if self.draft_tokens != "auto":
            return FixedLength(self.draft_tokens)
        most = self.canvas.nested_steps
        return CostModelLength(most) if most else CostModelLength()


def make_parser() -> OneLineErrors:
    """Return the parser of `generate.py`."""
    parser = OneLineErrors(
        prog="generate.py",
        description="Decode with a run, or with models spelled out; see configs/generate.",
    )
    parser.add_argument("--config", action="config", help="a file of these options")
    # plain str: a prompt such as "# read a file" is not to be read as YAML
    parser.add_argument("--prompt", type=str, default=None, help="the text to continue")
    parser.add_class_arguments(Options, skip={"prompt"})
    parser.built_class = None
    return parser


def parse_options(arguments: list[str]) -> Options:
    """Read the options and refuse what contradicts itself; no model is touched yet."""
    parser = make_parser()
    parsed = parser.parse_args([spelled_out(argument) for argument in arguments])
    for key in ("dtype", "attn_implementation"):
        if parsed[key] is not None:
            set_in_models([parsed["target"], parsed["drafter"]], key, parsed[key])
    for key in SIZES:
        if parsed["media"][key] is not None:
            set_in_models(parsed["target"], key, parsed["media"][key])
    if parsed["device"] != "auto":
        set_in_models([parsed["target"], parsed["drafter"]], "device", parsed["device"])
    try:
        values = parser.instantiate(parsed)
    except ValueError as error:
        refusal = constructor_refusal(str(error))
        reason = root_cause(error) if refusal is None else refusal[0]
        raise ConfigError(f"config error: {reason}") from error
    values.pop("config")
    options = Options(**vars(values))
    check_options(options)
    return options


def spelled_out(argument: str) -> str:
    """Return an argument with its section, where it may go without: --height, --media.height."""
    name, equals, value = argument.partition("=")
    if not name.startswith("--") or name[2:] not in WITHOUT_SECTION:
        return argument
    return f"--media.{name[2:]}{equals}{value}"


def set_in_models(node: Any, key: str, value: str) -> None:
    """Set an option in every block of a config that has it: `--dtype` is for all models."""
    if isinstance(node, Namespace):
        if key in node:
            node[key] = value
        node = list(vars(node).values())
    if isinstance(node, list):
        for part in node:
            set_in_models(part, key, value)


def check_options(options: Options) -> None:
    """Raise ConfigError for options that exclude or need one another, and for paths that fail."""
    if (options.run is None) == (options.target is None):
        wrong("run", "give --run checkpoints/NAME, or a target in a --config; one of the two")
    if options.run == "":
        wrong("run", "needs a value: --run checkpoints/NAME")
    if options.run is not None and options.drafter is not None:
        wrong("drafter", "a run has its own drafter; spell out the target too, in a --config")
    if (options.prompt is None) == (options.prompts is None):
        wrong("prompt", "give --prompt TEXT, or --prompts FILE with --output FILE; one of the two")
    media = options.target is not None or is_media_run(str(options.run))
    many = ("devices", "limit", "template") if media else ("devices", "limit", "template", *SHARED)
    refuse_for_one_prompt(options, many)
    for name in ("compare", "show_drafts"):
        if options.prompts is not None and getattr(options, name):
            wrong(name, "is for one --prompt; python -m specstream.benchmark measures many")
    if options.quantize == "none" and options.quantize_method != USUAL:
        wrong("quantize_method", "says how --quantize converts; give --quantize drafter, say")
    _check_paths(options)
    _check_devices(options)
    for part in ("sampling", "limits", "draft_length"):  # their constructors check themselves
        getattr(options, part)


def refuse_for_one_prompt(options: Options, names: Sequence[str]) -> None:
    """Raise ConfigError for options that have no effect on one prompt of text."""
    for name in names:
        if options.prompts is None and getattr(options, name) != getattr(Options, name):
            wrong(name, "is for a file of prompts (--prompts FILE)")


def _check_paths(options: Options) -> None:
    if options.prompts is not None and options.output is None:
        wrong("output", "needed with --prompts: the .jsonl file that gets the continuations")
    for name in ("output", "stats"):
        path = getattr(options, name)
        if path is not None and not Path(path).absolute().parent.is_dir():
            wrong(name, f"there is no folder '{Path(path).parent}'")
        if path is not None and Path(path).is_dir():
            wrong(name, f"'{path}' is a folder, not a file")
        if path is not None and Path(path).exists() and not Path(path).is_file():
            wrong(name, f"'{path}' is a device or the like, not a file")
        if path is not None and not os.access(Path(path).absolute().parent, os.W_OK | os.X_OK):
            wrong(name, f"no permission to write in '{Path(path).parent}'")
    read = {f"media.{name}": path for name, path in asdict(options.media.given).items()}
    files = read | {n: getattr(options, n) for n in ("prompts", "output", "stats")}
    given = [(name, path) for name, path in files.items() if path is not None]
    for (name, path), (other, before) in itertools.combinations(reversed(given), 2):
        if name not in read and Path(path).resolve() == Path(before).resolve():
            wrong(name, f"'{path}' is the file of --{other}, which it would replace")
    for name in ("output", "stats"):
        path = getattr(options, name)
        if path is not None and Path(path).exists() and not options.overwrite:
            wrong(name, f"'{path}' exists; give --overwrite true to replace it")


def _check_devices(options: Options) -> None:
    if options.devices < 1:
        wrong("devices", f"must be at least 1, not {options.devices}")
    import torch

    device = find_device(options.device)
    spread_devices(torch.device(device), options.media.devices)
    if options.devices == 1:
        return
    if device == "cpu":
        cores = os.cpu_count() or 1
        if options.devices > cores:
            wrong("devices", f"{options.devices} asked for, {cores} CPU cores found")
        return
    if device != "cuda":
        wrong("device", f"'{device}' is one device; leave it out to use {options.devices}")
    if options.devices > torch.cuda.device_count():
        wrong("devices", f"{options.devices} asked for, {torch.cuda.device_count()} GPUs found")


def wrong(key: str, reason: str) -> NoReturn:
    """Raise the one line for a wrong option."""
    raise ConfigError(f"config error: {key}: {reason}")


def root_cause(error: BaseException) -> BaseException:
    """Return the first error of a chain: a constructor's own words, without the parser's."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
