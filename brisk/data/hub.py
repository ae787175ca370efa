"""Data sets on the Hugging Face hub, and files that the `datasets` library reads."""

import logging
from pathlib import Path

from brisk.errors import UserError


class Rows:
    """The texts in one column of a `datasets.Dataset`; null rows are skipped."""

    def __init__(self, dataset, column, name):
        self.dataset, self.column, self.name = dataset, column, name
        columns = dataset.column_names or list(next(iter(dataset), {}))
        if column not in columns:
            found = ", ".join(columns) or "none"
            raise UserError(f"{name} has no column {column}; its columns are {found}")

    def __len__(self):
        return len(self.dataset)  # TypeError for a streamed data set

    def __iter__(self):
        try:
            for rows in self.dataset.iter(batch_size=1000):
                for text in rows[self.column]:
                    if isinstance(text, str):
                        yield text
                    elif text is not None:
                        raise UserError(f"{self.name}: the column {self.column} is not text")
        except UserError:
            raise
        except Exception as error:  # datasets and its file readers raise any exception
            raise UserError(f"cannot read {self.name}: {error.__cause__ or error}") from error


def load(name, **options):
    """`datasets.load_dataset(name, …)`. Raises `UserError` if it fails or the data set is empty."""
    where = (options.get("data_files") or [name])[0]
    try:
        from datasets import load_dataset

        for library in ("datasets", "huggingface_hub"):
            logging.getLogger(library).setLevel(logging.CRITICAL)  # the error below is enough
        dataset = load_dataset(name, split="train", **options)
        columns = dataset.column_names or next(iter(dataset), {})
    except Exception as error:  # datasets and its file readers raise any exception
        if "data_files" in options:
            raise UserError(f"cannot read {where}: {error.__cause__ or error}") from error
        needs = "the hub needs a network and pip install datasets"
        here = f"there is no file or folder {name}, and it cannot be loaded from the hub"
        raise UserError(f"{here}: {error.__cause__ or error} ({needs})") from error
    if not columns:
        raise UserError(f"{where} is empty")
    return dataset


def files_on_hub(repository, folder):
    """Names of the files in a folder of a data set on the hub. Raises `UserError`."""
    return ask_hub(
        f"cannot list the files of {repository}",
        lambda hub: [
            name
            for name in sorted(hub.HfApi().list_repo_files(repository, repo_type="dataset"))
            if name.startswith(folder)
        ],
    )


def download_from_hub(repository, name, folder):
    """Download a file of a data set on the hub to `folder`, continuing an interrupted download.
    Returns its path. Raises `UserError`."""
    return ask_hub(
        f"cannot download {name} of {repository}",
        lambda hub: Path(
            hub.hf_hub_download(repository, name, repo_type="dataset", local_dir=folder)
        ),
    )


def ask_hub(failure, query):
    """Return `query(huggingface_hub)`. Raises `UserError` with the text `failure` if it fails."""
    try:
        import huggingface_hub

        return query(huggingface_hub)
    except Exception as error:  # network, disk, missing file or missing package
        reason = f"{type(error).__name__}: {error}"
        remedy = "check the network and run this again, or use your own files"
        raise UserError(f"{failure} ({reason}); {remedy}") from error
