"""Data sets as the `datasets` library reads them: on the Hugging Face hub, and in files."""

import logging
from pathlib import Path

from brisk.errors import UserError


class Rows:
    """The texts in one column of a `datasets` data set; rows without one are left out."""

    def __init__(self, dataset, column, name):
        self.dataset, self.column, self.name = dataset, column, name
        columns = dataset.column_names or list(next(iter(dataset), {}))
        if column not in columns:
            raise UserError(f"{name} has no column {column}, it has {', '.join(columns) or 'none'}")

    def __len__(self):
        return len(self.dataset)  # a TypeError where it is read as it comes

    def __iter__(self):
        try:
            for rows in self.dataset.iter(batch_size=1000):
                for text in rows[self.column]:
                    if isinstance(text, str):
                        yield text
                    elif text is not None:
                        raise UserError(f"{self.name}: the column {self.column} holds no text")
        except UserError:
            raise
        except Exception as error:  # datasets and its file readers raise of every kind
            raise UserError(f"cannot read {self.name}: {error.__cause__ or error}") from error


def load(name, **options):
    """`datasets.load_dataset(name, …)` with its failures in one line."""
    where = (options.get("data_files") or [name])[0]
    try:
        from datasets import load_dataset

        for library in ("datasets", "huggingface_hub"):
            logging.getLogger(library).setLevel(logging.CRITICAL)  # told below, in one line
        dataset = load_dataset(name, split="train", **options)
        columns = dataset.column_names or next(iter(dataset), {})
    except Exception as error:  # datasets and its file readers raise of every kind
        if "data_files" in options:
            raise UserError(f"cannot read {where}: {error.__cause__ or error}") from error
        needs = "this needs the package datasets, and the network or files of yours"
        here = f"no file or folder {name} here, and no such data set on the hub"
        raise UserError(f"{here}: {error.__cause__ or error} ({needs})") from error
    if not columns:
        raise UserError(f"{where} is empty")
    return dataset


def files_on_hub(repository, folder):
    """The names of the files in a folder of a data set on the Hugging Face hub."""
    return ask_hub(
        f"no list of the files of {repository}",
        lambda hub: [
            name
            for name in sorted(hub.HfApi().list_repo_files(repository, repo_type="dataset"))
            if name.startswith(folder)
        ],
    )


def download_from_hub(repository, name, folder):
    """The path of a file of a data set on the hub, downloaded to `folder`; a download that was
    stopped goes on."""
    return ask_hub(
        f"no {name} of {repository}",
        lambda hub: Path(
            hub.hf_hub_download(repository, name, repo_type="dataset", local_dir=folder)
        ),
    )


def ask_hub(failure, question):
    try:
        import huggingface_hub

        return question(huggingface_hub)
    except Exception as error:  # no network, no room, no such file, no such package
        reason = f"{type(error).__name__}: {error}"
        remedy = "run this again when there is a network, or give files of your own"
        raise UserError(f"{failure} ({reason}); {remedy}") from error
