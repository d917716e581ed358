"""A prepared source: its records as tokens and, where images stay continuous, as pixels or latents.

A source is prepared once, kept on disk as Arrow, and memory-mapped. It is a folder `<name>-<fingerprint>/` of chunks
with a `meta.json` that names them, see `preparation`. The fingerprint covers everything that the tokens were made from:
a change makes another folder.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa

from modeling_mot.latent_vae import vae_fingerprint
from training.data.config import SourceConfig
from training.data.documents import ImageColumn, TokenColumn, Vocabulary
from training.data.preparing.batch_tokenizer import BatchTokenizer, Preparing
from training.data.preparing.preparation import SIZES, VALUES, chunk_damage, open_chunk, prepare, read_description
from training.data.reading.records import SHARD_RECORDS, Source
from training.data.reading.sources import digest_of, open_source
from training.data.reading.values import LeftOut


# A part of every fingerprint. Raise it when the same records must give other tokens than before.
FORMAT_VERSION = 4


class TokenizedSource:
    """The tokens of a source, record by record.

    Attributes:
        config: the source's configuration.
        vocabulary: `Vocabulary` of the processor that made the tokens.
        fingerprint: over everything the tokens were made from.
        left_out: the records that were left out (`on_error: skip`).
        tokens: ids of all segments of all records, of the first variant.
        records: (len,) the number of each record in its source.
        columns: `Segment` -> `TokenColumn`; texts have one variant, pictures and sounds one or more.
        images: "pixels" or "latents", as images are kept; None where they are codes.
        image_columns: `Segment` -> `ImageColumn` of the segments that may hold images; none where images are codes.
    """

    def __init__(self, config: SourceConfig, folder: Path):
        self.config = config
        self.folder = Path(folder)
        # The description, and the chunks that it names.
        try:
            meta = read_description(self.folder / "meta.json")
        except ValueError as error:
            raise ValueError(self._damaged([str(error)])) from error
        self.fingerprint = meta["fingerprint"]
        self.tokens = meta["tokens"]
        self.left_out = LeftOut(meta["skipped"], meta["first_skipped"], meta.get("more_skipped", {}))
        self._chunks = meta["chunks"]
        self._shards = meta["shards"]
        self._refuse_damage()

        # The columns, which stay on the disk.
        self.vocabulary = Vocabulary.from_dict(meta["vocabulary"])
        self.table = table = pa.concat_tables(open_chunk(self.folder / chunk["file"]) for chunk in self._chunks)
        self.columns = {segment: TokenColumn(table.column(str(segment)).chunks) for segment in config.segments}
        self.records = np.asarray(table.column("record"))
        self.images = meta["images"]
        self.image_columns = {
            segment: ImageColumn(
                *(TokenColumn(table.column(f"{segment}{part}").chunks) for part in (VALUES, SIZES)), meta["channels"]
            )
            for segment in config.segments
            if f"{segment}{VALUES}" in table.column_names
        }

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, list[list[int]]]:
        """Give the ids of every segment of a record, a list per variant."""
        names = [str(segment) for segment in self.columns]
        return self.table.slice(int(index), 1).select(names).to_pylist()[0]

    def verify(self) -> None:
        """Hash every file again.

        Raises:
            ValueError: a file has changed since it was written.
        """
        self._refuse_damage(anew=True)

    def _refuse_damage(self, anew: bool = False) -> None:
        with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter to others
            found = pool.map(lambda chunk: chunk_damage(self.folder, chunk, anew), self._chunks)
        if damage := [what for what in found if what is not None]:
            raise ValueError(self._damaged(damage))

    def _damaged(self, what: list[str]) -> str:
        more = f" and {len(what) - 3} more" if len(what) > 3 else ""
        return (
            f"prepared source {self.config.name!r} is damaged: {'; '.join(what[:3])}{more}; remove {self.folder}, and "
            "it is made again"
        )

    def name_of(self, index: int) -> str:
        """Name the record at `index` for a message."""
        number = int(self.records[index])
        if not self._shards:
            return f"record {number}"
        return f"record {number % SHARD_RECORDS} of shard {self._shards[number // SHARD_RECORDS]}"

    @property
    def skipped(self) -> dict[str, int]:
        """Reason -> number of records that were left out."""
        return self.left_out.counts

    @property
    def first_skipped(self) -> dict[str, str]:
        """Reason -> name of the first record that was left out."""
        return self.left_out.first

    @property
    def variants(self) -> int:
        """The largest number of variants of any segment."""
        return max(column.variants for column in self.columns.values())

    @classmethod
    def prepare(cls, config: SourceConfig, preparing: Preparing) -> "TokenizedSource":
        """Tokenise a source, or find it tokenised in the cache.

        Raises:
            ValueError: a record that cannot be used, by source, record number and column (`on_error: raise`), or
                nothing left of the source; a prepared file that has changed since it was written.
        """
        config.validate()
        source = open_source(config, preparing.limits)
        made_from = _made_from(source, preparing)
        folder = Path(preparing.cache) / f"{_file_name(config.name)}-{digest_of(made_from)[:16]}"
        if not os.path.isfile(folder / "meta.json"):
            prepare(folder, made_from, BatchTokenizer(source, preparing))
        prepared = cls(config, folder)
        # `on_error` is no part of the fingerprint: chunks that are finished when a bad record is met are kept.
        if prepared.skipped and config.on_error == "raise":
            raise ValueError(
                f"source {config.name!r} was prepared with on_error: skip, and left out "
                f"{'; '.join(prepared.left_out.lines())}; set on_error: skip, or mend these records"
            )
        return prepared


def _made_from(source: Source, preparing: Preparing) -> dict:
    """List everything that the tokens of a source depend on."""
    made_from = {
        "format": FORMAT_VERSION,
        "source": source.fingerprint,
        "processor": preparing.processor.fingerprint(),
        "segments": [str(segment) for segment in source.config.segments],
        "augmentation": asdict(preparing.augmentation) if preparing.augmentation else None,
        "limits": asdict(preparing.limits),
    }
    if preparing.images == "latents":
        made_from["vae"] = vae_fingerprint(preparing.vae)
    return made_from


def _file_name(name: str) -> str:
    return "".join(character if character.isalnum() or character in "-_" else "_" for character in name)[:50]
