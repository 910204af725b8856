"""A model of the hub as a local folder: only the files that are read, none that could run code."""

from __future__ import annotations

from pathlib import Path

from apexflow.backbones.folder import INDEX, OWN, components, with_lora
from apexflow.backbones.single_file import made_a_model
from apexflow.errors import UserError, in_a_shell, is_full_disk

READ = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
# The same weights in another precision, or another average.
TWINS = ("*.fp16*", "*.bf16*", "*.fp8*", "*.int8*", "*.int4*", "*.non_ema*")
NETWORKS = ("transformer", "unet")


def download(hub_id: str, network: bool = True) -> Path:
    """The snapshot of a hub repository, fetched where it is not there yet; UserError says why where it cannot be.

    Without the weights of its `network` where another's are to take their place: they are most of it.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=[INDEX]))
        if not (folder / INDEX).is_file():
            raise UserError(
                f"{hub_id!r} is not a diffusers checkpoint: the hub has no {INDEX} for it{_instead(hub_id)}"
            )
        parts = [f"{name}/{ending}" for name in components(folder) for ending in READ]
        left = [*TWINS, *([] if network else [f"{name}/*.safetensors" for name in NETWORKS])]
        return Path(snapshot_download(hub_id, allow_patterns=[INDEX, *OWN, *parts], ignore_patterns=left))
    except UserError:
        raise
    except Exception as error:  # the hub raises many kinds
        told = f"{hub_id!r} is not a local folder, and cannot be downloaded from the hub"
        raise UserError(f"{told}: {why_not(hub_id, error, 'model')}") from error


def _instead(hub_id: str) -> str:
    """How a repository that holds loose weights, as most LoRAs are published, is used; empty where it holds none."""
    from huggingface_hub import list_repo_files

    loose = [name for name in list_repo_files(hub_id) if "/" not in name and name.endswith(".safetensors")]
    if not loose:
        return ""
    return (
        f". `hf download {hub_id} {in_a_shell(loose[0])} --local-dir .` downloads what it has. If {loose[0]} is a LoRA, "
        f"{with_lora(loose[0])}; if it is a network, {made_a_model(loose[0])}"
    )


def why_not(page: str, error: Exception, what: str) -> str:
    """Why a repository, whose page on the hub is `page`, could not be fetched, and what to do; `what` it was taken for."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        where = f"https://huggingface.co/{page}"
        return f"accept its owners' terms at {where}, then log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub has no such {what}: check the name, or log in with `hf auth login` if it is private"
    if is_full_disk(error):
        return "no space is left: free some, or set HF_HOME to a folder on another disk"
    return f"check the name and the network ({type(error).__name__})"
