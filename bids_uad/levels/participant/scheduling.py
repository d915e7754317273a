"""Who runs the nodes of a run's workflow: workers of this process, or the jobs of a cluster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Any, Protocol

import yaml

from bids_uad.config import RunConfig
from bids_uad.errors import ConfigError
from bids_uad.levels.participant.cluster import SlurmGraphPlugin, SlurmPlugin
from bids_uad.levels.participant.plugin import IsolatedPlugin, NodeFailure

PLUGINS = ("MultiProc", "SLURM", "SLURMGraph")


class Plugin(Protocol):
    """What a run needs of a nipype plugin beside nipype's own interface."""

    failures: list[NodeFailure]
    folders: tuple[Path, ...]

    def close(self) -> None:
        """Stop what is still under way."""


def make_plugin(config: RunConfig, callback: Callable[[Any, str], None]) -> Plugin:
    """Make the plugin that a run asks for.

    Parameters
    ----------
    config : RunConfig
        `plugin_file` names the plugin and its arguments; without it, workers of this process.
    callback : callable
        Is told of each node's start and end, where the plugin knows.

    Returns
    -------
    Plugin

    Raises
    ------
    ConfigError
        If the file is not understood, or the path of the working folder is one that job scripts cannot hold.
    """
    name, arguments = "MultiProc", {}
    if config.plugin_file is not None:
        name, arguments = read_plugin_file(config.plugin_file)
        if name != "MultiProc":
            check_job_folder(config.work_dir)
    if name == "SLURMGraph":
        plugin = SlurmGraphPlugin(arguments, mark=config.run_id)
    elif name == "SLURM":
        plugin = SlurmPlugin({"status_callback": callback, **arguments})
    else:
        own = {
            "n_procs": config.nprocs,
            "memory_gb": config.mem_gb,
            "n_gpu_procs": config.n_gpu_procs,
            "raise_insufficient": False,
        }
        plugin = IsolatedPlugin({**own, "status_callback": callback, **arguments})
    plugin.folders = (config.output_dir, config.work_dir)
    return plugin


def check_job_folder(folder: Path) -> None:
    """Refuse a working folder whose path nipype's job scripts, which do not quote it, cannot hold.

    Raises
    ------
    ConfigError
    """
    plain = "".join(character for character in str(folder) if character.isascii())
    if plain != quote(plain) or "%" in plain:  # SLURM replaces %j and the like in the names of log files
        raise ConfigError(
            f"the work folder {folder} has a space, quote, bracket or other special character in its path, "
            "which jobs of a cluster cannot use; choose another with -w"
        )


def read_plugin_file(path: Path) -> tuple[str, dict[str, Any]]:
    """Read a plugin and its arguments from YAML, as fMRIPrep does.

    Parameters
    ----------
    path : pathlib.Path
        A mapping with `plugin`, one of `PLUGINS`, and perhaps `plugin_args`.

    Returns
    -------
    name : str
    arguments : dict

    Raises
    ------
    ConfigError
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--use-plugin {path} cannot be read: {error}") from error
    remedy = "write 'plugin: SLURM' and, below it, 'plugin_args:' with what the plugin takes"
    if not isinstance(content, dict) or not {"plugin"} <= set(content) <= {"plugin", "plugin_args"}:
        raise ConfigError(f"--use-plugin {path}: {remedy}")
    if content["plugin"] not in PLUGINS:
        raise ConfigError(f"--use-plugin {path}: plugin {content['plugin']} is none of {', '.join(PLUGINS)}")
    arguments = content.get("plugin_args") or {}
    if not isinstance(arguments, dict):
        raise ConfigError(f"--use-plugin {path}: plugin_args must be a mapping; {remedy}")
    return content["plugin"], arguments
