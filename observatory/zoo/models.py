"""Finding and loading models: bundled checkpoints, local directories, hub ids.

Only safetensors weights and configurations of transformers' own classes are read. Nothing that a checkpoint
brings along is executed: `trust_remote_code` is never on and pickled weights are refused.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from observatory.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_CHECKPOINTS = Path(__file__).parent / "checkpoints"
BUNDLED_NAMES = ("tiny-mla", "tiny-mha", "tiny-gqa", "tiny-mamba2", "tiny-gdn")
_LONGEST_NAME = 1024
_LARGEST_CONFIG_BYTES = 4 * 2**20
_DTYPES = ("float32", "bfloat16", "float16")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class BundledModel:
    """A checkpoint that comes with the package.

    Attributes:
        name: what `load_model` takes.
        mixer: sequence mixer: MLA, MHA, GQA, Mamba-2 or GDN.
        family: model family whose class and routing it has.
        directory: folder with config.json, model.safetensors and training.json.
        held_out_loss: nats per token on the held-out parts of the four real conditions.
        unigram_cross_entropy: of unigrams of each condition's training text, same tokens, nats per token.
        held_out_losses: the same loss by condition, nats per token.
        parameters: number of weights.
    """

    name: str
    mixer: str
    family: str
    directory: Path
    held_out_loss: float
    unigram_cross_entropy: float
    held_out_losses: Mapping[str, float]
    parameters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        name: what was asked for; for a directory its last component.
        mixer: sequence mixer read from the configuration, None when it is not recognised.
        family: of a bundled model its family, else `model_type` of the configuration.
        model: in evaluation mode, on the device and in the type asked for.
        tokenizer: None when the checkpoint has none.
        vocabulary_size: entries of the embedding.
        source: `bundled`, `directory` or `hub`.
    """

    name: str
    mixer: str | None
    family: str
    model: "torch.nn.Module"
    tokenizer: "PreTrainedTokenizerBase | None"
    vocabulary_size: int
    source: str


def bundled_models() -> tuple[BundledModel, ...]:
    """The five bundled checkpoints in fixed order: MLA, MHA, GQA, Mamba-2, GDN.

    Raises:
        ModelError: the installation lacks a file.
    """
    models = []
    for name in BUNDLED_NAMES:
        try:
            facts = json.loads((_CHECKPOINTS / name / "training.json").read_text(encoding="utf-8"))
            models.append(
                BundledModel(
                    name=name,
                    mixer=facts["recipe"]["mixer"],
                    family=facts["recipe"]["family"],
                    directory=_CHECKPOINTS / name,
                    held_out_loss=facts["held_out_loss_overall_nats"],
                    unigram_cross_entropy=facts["unigram_cross_entropy_overall_nats"],
                    held_out_losses=facts["held_out_loss_nats"],
                    parameters=facts["parameters"],
                )
            )
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"bundled model {name} is incomplete ({error}); install the package again"
            ) from error
    return tuple(models)


def load_model(name: str, *, device: str = "cpu", dtype: str | None = None) -> LoadedModel:
    """Load a causal language model, or the language side of a vision-language model.

    Args:
        name: of a bundled model, or a checkpoint directory, or a hub id such as `org/model`.
        device: torch device string.
        dtype: `float32`, `bfloat16` or `float16`; by default float32 on the CPU, else the checkpoint's own.

    Raises:
        ModelError: no such model, not a checkpoint, unsafe or missing weights, an architecture that is
            unknown or an encoder-decoder, hub unreachable.
    """
    directory = find_checkpoint(name)
    check_dtype(dtype)
    if name in BUNDLED_NAMES:
        bundled = next(model for model in bundled_models() if model.name == name)
        from observatory.zoo.tokenizer import load_tokenizer

        model = _load_weights(name, str(bundled.directory), device, dtype, local=True)
        return LoadedModel(
            name=name,
            mixer=bundled.mixer,
            family=bundled.family,
            model=model,
            tokenizer=load_tokenizer(),
            vocabulary_size=_vocabulary_size(model),
            source="bundled",
        )
    local = directory is not None
    where = name if directory is None else str(directory)
    model = _load_weights(name, where, device, dtype, local=local)
    config: Any = model.config
    return LoadedModel(
        name=name if directory is None else directory.resolve().name or name,
        mixer=mixer_of_config(config),
        family=str(getattr(config, "model_type", "unknown")),
        model=model,
        tokenizer=_load_tokenizer(where, local=local),
        vocabulary_size=_vocabulary_size(model),
        source="directory" if local else "hub",
    )


def find_checkpoint(name: str) -> Path | None:
    """Directory of a model, its configuration and weights present; None for a hub id. Loads no library.

    Raises:
        ModelError: no such model, not a checkpoint, or pickled weights only.
    """
    _check_name(name)
    if name in BUNDLED_NAMES:
        return _CHECKPOINTS / name
    directory = _expanded(name)
    if _is_directory(directory):
        _check_directory(directory, name)
        return directory
    if _exists(directory) or not _looks_like_hub_id(name):
        raise ModelError(
            f"no model {name!r}; expected {', '.join(BUNDLED_NAMES)}, a directory, or a hub id org/model"
        )
    return None


def read_config(directory: Path, name: str) -> dict[str, Any]:
    """The configuration of a checkpoint directory.

    Raises:
        ModelError: missing, too large, not JSON, or without a model type.
    """
    config_path = directory / "config.json"
    if not config_path.is_file():
        raise ModelError(f"{name!r} has no config.json; expected a checkpoint saved with save_pretrained")
    try:
        if config_path.stat().st_size > _LARGEST_CONFIG_BYTES:
            raise ModelError(
                f"config.json of {name!r} is larger than {_LARGEST_CONFIG_BYTES} bytes; not a configuration"
            )
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"config.json of {name!r} cannot be read: {_first_line(error)}; expected JSON"
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"config.json of {name!r} has no model_type; expected a transformers configuration")
    return config


def has_tokenizer(directory: Path) -> bool:
    """Whether a checkpoint directory has a tokenizer of its own."""
    return any((directory / name).is_file() for name in _TOKENIZER_FILES)


def _hub_has_tokenizer(name: str) -> bool:
    """Whether the hub, or the local cache of it, has a tokenizer of this checkpoint."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for file in _TOKENIZER_FILES:
        with contextlib.suppress(EntryNotFoundError):
            hf_hub_download(name, file)
            return True
    return False


def check_dtype(dtype: str | None) -> None:
    """Raise ModelError for a type that models are not loaded in."""
    if dtype is not None and dtype not in _DTYPES:
        raise ModelError(f"unknown dtype {ascii(dtype)[:40]}; expected one of {', '.join(_DTYPES)}")


def mixer_of_config(config: Any) -> str | None:
    """The sequence mixer a configuration describes, None when it says nothing that is recognised.

    A hybrid is named after its recurrent layers. Marks, in this order: `kv_lora_rank` (MLA); linear-attention
    heads with delta-rule parameters (GDN); Mamba heads (Mamba-2); fewer key-value heads than heads (GQA); as
    many (MHA).
    """
    config = getattr(config, "text_config", None) or config
    if getattr(config, "kv_lora_rank", None):
        return "MLA"
    if getattr(config, "linear_num_value_heads", None) and getattr(config, "linear_key_head_dim", None):
        return "GDN"
    if getattr(config, "mamba_num_heads", None) or getattr(config, "mamba_n_heads", None):
        return "Mamba-2"
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int) or heads < 1:
        return None
    key_value_heads = getattr(config, "num_key_value_heads", None)
    if key_value_heads is None or key_value_heads == heads:
        return "MHA"
    return "GQA" if isinstance(key_value_heads, int) and key_value_heads < heads else None


def _check_name(name: str) -> None:
    if not name or len(name) > _LONGEST_NAME or not name.isprintable():
        shown = ascii(name)[:60]
        raise ModelError(
            f"model name {shown} ({len(name)} characters) is refused; expected 1 to {_LONGEST_NAME} printable"
        )


def _expanded(name: str) -> Path:
    """The path a name stands for, `~` and `~user` expanded where there is such a home."""
    try:
        return Path(name).expanduser()
    except RuntimeError:  # no such user, or no home at all
        return Path(name)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # as below
        return False


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a component longer than the file system allows
        return False


def _looks_like_hub_id(name: str) -> bool:
    parts = name.split("/")
    allowed = all(part and part.strip(".") and all(c.isalnum() or c in "-_." for c in part) for part in parts)
    return len(parts) == 2 and len(name) <= 96 and allowed and name.isascii()


def _check_directory(directory: Path, name: str) -> None:
    """Refuse what is not a safetensors checkpoint, before any library looks at it."""
    read_config(directory, name)
    if not any(directory.glob("*.safetensors")):
        pickled = next(
            (path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern)), None
        )
        if pickled:
            raise ModelError(
                f"{name!r} has only pickled weights ({pickled!r}), which can run code; convert to safetensors"
            )
        raise ModelError(
            f"{name!r} has no .safetensors weights; expected a checkpoint saved with save_pretrained"
        )


def _load_weights(name: str, where: str, device: str, dtype: str | None, *, local: bool) -> "torch.nn.Module":
    try:
        import torch
        import transformers as library
    except ImportError as error:
        raise ModelError(
            f"loading {name!r} needs torch and transformers; run `pip install 'moe-observatory[capture]'`"
        ) from error
    transformers: Any = library  # it is typed in parts only
    if device == "meta":
        raise ModelError("device meta holds no values, so nothing can be routed; expected e.g. cpu or cuda:0")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"unknown device {ascii(device)[:40]}; expected e.g. cpu or cuda:0") from error
    wanted = dtype or ("float32" if target.type == "cpu" else "auto")
    try:
        with quiet_transformers():
            config = transformers.AutoConfig.from_pretrained(
                where, trust_remote_code=False, local_files_only=local
            )
            model, loading = _model_class(transformers, config, name).from_pretrained(
                where,
                dtype=wanted,
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=local,
                output_loading_info=True,
            )
            _check_whole(loading, name)
            ready: torch.nn.Module = model.to(target).eval()
            return ready
    except ModelError:
        raise
    except Exception as error:  # transformers, safetensors and the hub client raise many kinds
        hint = (
            "check that the files belong together"
            if local
            else "check the id, the network and HF_HUB_OFFLINE"
        )
        raise ModelError(f"{name!r} cannot be loaded: {_first_line(error)}; {hint}") from error


def _model_class(transformers: Any, config: Any, name: str) -> Any:
    """The auto class that makes a model of this configuration which is fed token ids alone."""
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name!r} is an encoder-decoder ({config.model_type}), which needs inputs for both sides; "
            "run it in your own program inside `with observatory.watch(model, OUT)`"
        )
    # A vision-language model is fed text only, and its MoE layers are those of its language model.
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and (
        type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    ):
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def _check_whole(loading: Mapping[str, Any], name: str) -> None:
    """Refuse weights that transformers would have made up: routing of random weights looks like a result."""
    made_up = sorted(str(key) for key in (*loading["missing_keys"], *loading["mismatched_keys"]))
    if made_up:
        raise ModelError(
            f"{name!r} lacks {len(made_up)} weights or has them in another shape, first {made_up[0]!r}; "
            "they would be random: get the whole checkpoint"
        )


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers' progress bars and notes about missing GPU kernels off the terminal."""
    from transformers.utils import logging as library

    logging: Any = library  # it is typed in parts only
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _load_tokenizer(where: str, *, local: bool) -> "PreTrainedTokenizerBase | None":
    import transformers as library

    transformers: Any = library
    try:
        # Without its files transformers makes up an empty tokenizer.
        if not (has_tokenizer(Path(where)) if local else _hub_has_tokenizer(where)):
            return None
        with quiet_transformers():
            tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
                where, trust_remote_code=False, local_files_only=local
            )
            return tokenizer
    except Exception as error:  # as above
        raise ModelError(
            f"tokenizer of {where!r} cannot be loaded: {_first_line(error)}; remove or repair it"
        ) from error


def _vocabulary_size(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:240]
