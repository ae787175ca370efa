"""Old names of keys, still valid in config files, on the command line and in checkpoints."""

RENAMED_KEYS = {  # old name: new name
    "decay_share": "decay_frac",
    "dry_run_ranks": "dry_run_world_size",
    "keep_checkpoints": "keep_last",
    "show_next": "top_next",
}


def new_key(key):
    """The current name of `key`."""
    return RENAMED_KEYS.get(key, key)
