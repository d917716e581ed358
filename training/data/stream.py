"""The training stream: the order of documents, the rows they are packed into, and the batches of a step.

Everything is a function of (seed, index). Documents come in blocks of `block_documents`; within each block every source
has its share of documents, all of them are packed together, and block b needs nothing but (seed, b). Each source goes
through all its records, in a new order each time, before any comes again.
"""

import hashlib
import math
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from training.data.config import DataConfig, Segment, TemplateConfig
from training.data.documents import (
    Document,
    Piece,
    Vocabulary,
    build_row,
    compose,
    document_lengths,
    images_of,
    pack,
    ways_of,
)
from training.data.preparing.preparation import TokenizedSource
from training.data.roles import (
    FEATURES,
    compose_parts,
    draw_omitted,
    is_omitted,
    mean_tokens,
    part_lengths,
    parts_of,
)


# L tokens of a row; G rows of a step

# The purposes of random numbers: each has a sequence of its own.
_ORDER, _DRAW, _VARIANT, _MIX, _REPLACE, _OMIT = range(6)


@dataclass(frozen=True)
class Draws:
    """The documents of one block, all arrays of the same length.

    Attributes:
        source, record, template: indices.
        text_first: true where texts stand before pictures and sounds, or where the order is as written.
        dropped: true where texts are dropped, see `arrange`.
        omitted: the parts that are left out, as a bit set, where pictures have roles.
        variant: which changed copy of pictures and sounds.
        length: tokens of the document.
    """

    source: np.ndarray
    record: np.ndarray
    template: np.ndarray
    text_first: np.ndarray
    dropped: np.ndarray
    omitted: np.ndarray
    variant: np.ndarray
    length: np.ndarray

    def __len__(self) -> int:
        return len(self.record)


def replace_codes(row: dict, most: float, vocabulary: Vocabulary, random: np.random.Generator) -> None:
    """Put random codes of the same modality in the place of some picture codes and speech units of the input.

    For each document a share between 0 and `most` is drawn, and this share of its codes is replaced. Labels stay. So
    the model learns to continue after wrong codes, such as it will generate itself, and to rely on the text. (The
    implementation of arXiv 2012.09841 does the same with one fixed share.)
    """
    share = random.uniform(0, most, size=row["document_ids"].max() + 2)
    hit = random.random(len(row["input_ids"])) < share[row["document_ids"]]
    for number, modality in enumerate(vocabulary.token_modalities):
        if modality == 0:
            continue
        places = np.flatnonzero(hit & (row["modality_ids"] == modality))
        first, end = vocabulary.bounds[number : number + 2]
        row["input_ids"][places] = random.integers(first, end, size=len(places))


@dataclass
class Counted:
    """Documents of each source, and rows, before each block from block `first` on."""

    first: int
    documents: list[np.ndarray]
    rows: list[int]


class RowStream:
    """An endless sequence of packed rows over tokenised sources.

    Several threads may ask for rows. Memory holds, per record of a source, 4 bytes for each template, order and variant
    (the length), 4 bytes for each of the last two epochs (the order) and, with variants, 2 bytes more; and about 100
    bytes per counted block. Tokens and pictures stay in the memory-mapped files.

    Args:
        config: its `row_length`, `seed`, `weights_by`, `token_shares`, `block_documents`, `replaced_codes` and
            `clean_copies` are used; templates and weights are those of `sources[i].config`.
        sources: tokenised by one processor, their images all kept in one way.

    Raises:
        ValueError: no sources, sources of different processors or with images kept in different ways, or a document
            with a picture or a sound that is longer than a row. (A document of text alone is split where a row ends.)
            `token_shares` that no mixture of the sources has.
    """

    def __init__(self, config: DataConfig, sources: list[TokenizedSource]):
        check_sources(sources)
        self.config = config
        self.sources = sources
        self.vocabulary = sources[0].vocabulary
        for source in sources:
            check_row_length(source, config.row_length, config.clean_copies)

        # The share of each source in the documents, from its weight in documents or tokens, or from shares of tokens.
        weights = np.array([source.config.weight for source in sources], dtype=np.float64)
        means = [mean_document_length(source, config.clean_copies) for source in sources]
        if config.weights_by == "tokens":
            weights /= means
        if config.token_shares is not None:
            weights = weights_of_shares(config.token_shares, sources, weights, config.clean_copies)
        self.document_shares = weights / weights.sum()
        self.block_documents = config.block_documents or _block_documents(
            config.row_length, float(self.document_shares @ means)
        )

        # What is asked of a source for every block.
        self._keys = [int.from_bytes(hashlib.sha256(s.config.name.encode()).digest()[:4], "big") for s in sources]
        self._records = [len(source) for source in sources]
        self._variants = [source.variants for source in sources]
        self._ways = [[ways_of(template) for template in source.config.templates] for source in sources]
        self._has_both = [[template.has_both for template in source.config.templates] for source in sources]
        self._parts = None
        if self.vocabulary.has_roles:
            self._parts = [[parts_of(template) for template in source.config.templates] for source in sources]

        # Caches: documents and rows before each block, orders, first variants, lengths, packed blocks.
        self._counting = threading.RLock()
        self._counted = self._from_the_start()
        self._epoch_order = lru_cache(maxsize=2 * len(sources) + 2)(self._shuffle)
        self._offsets = lru_cache(maxsize=None)(self._first_variants)
        self._lengths = lru_cache(maxsize=None)(self._document_lengths)
        self._lengths_of_parts = lru_cache(maxsize=None)(self._part_lengths)
        # A step's rows of one rank often span a few blocks.
        self._packed = lru_cache(maxsize=4)(self._pack)

    # ------------------------------------------------------------------------------------------------------ documents

    def draws_before(self, block: int) -> np.ndarray:
        """Count the documents that each source has given before a block.  (sources,)

        Every block pays each source the documents owed by then: whole documents first, then the largest remainders.
        After any number of blocks a source is less than one document off its share (two for more than two sources).
        """
        with self._counting:
            counted = self._counted_from(block)
            size = self.block_documents
            while counted.first + len(counted.documents) <= block:
                before = counted.documents[-1]
                owed = self.document_shares * size * (counted.first + len(counted.documents)) - before
                quota = np.maximum(np.floor(owed), 0).astype(np.int64)
                left = size - int(quota.sum())
                quota[np.argsort(quota - owed, kind="stable")[: max(left, 0)]] += 1
                while quota.sum() > size:
                    quota[np.argmax(quota - owed)] -= 1
                counted.documents.append(before + quota)
            return counted.documents[block - counted.first]

    def draws(self, block: int) -> Draws:
        """Draw the documents of a block, mixed."""
        first, last = self.draws_before(block), self.draws_before(block + 1)
        parts = [self._draw(index, block, int(first[index]), int(last[index])) for index in range(len(self.sources))]
        mixed = self._random(_MIX, block).permutation(self.block_documents)
        names = Draws.__dataclass_fields__
        return Draws(**{name: np.concatenate([getattr(part, name) for part in parts])[mixed] for name in names})

    def _draw(self, index: int, block: int, first: int, last: int) -> Draws:
        source, key = self.sources[index], self._keys[index]
        # Each source goes through all its records, in the order of the epoch.
        epochs, places = np.divmod(np.arange(first, last), self._records[index])
        record = np.empty(last - first, dtype=np.int64)
        for epoch in np.unique(epochs):
            record[epochs == epoch] = self._epoch_order(index, int(epoch))[places[epochs == epoch]]
        # Each time a record comes it is another variant, until all have been.
        variant = (self._offsets(index)[record] + epochs) % self._variants[index]
        # A template for each, its order and whether its caption is dropped.
        uniform = self._random(_DRAW, key, block).random((last - first, 3))
        templates = source.config.templates
        bounds = np.cumsum([template.weight for template in templates])
        template = np.searchsorted(bounds / bounds[-1], uniform[:, 0], side="right").clip(max=len(templates) - 1)
        text_first, dropped = np.ones(len(record), dtype=bool), np.zeros(len(record), dtype=bool)
        omitted, length = np.zeros((2, len(record)), dtype=np.int64)
        if self._parts is not None:
            self._omit(index, block, record, variant, template, omitted, length)
        for number, settings in enumerate(templates if self._parts is None else ()):
            mine = template == number
            if self._has_both[index][number]:
                if settings.caption_first is not None:
                    text_first[mine] = uniform[mine, 1] < settings.caption_first
                dropped[mine] = text_first[mine] & (uniform[mine, 2] < settings.caption_dropout)
            for place, way in enumerate(self._ways[index][number]):
                chosen = mine & (text_first == way.text_first) & (dropped == way.dropped)
                lengths = self._lengths(index, number, place)
                length[chosen] = lengths[record[chosen], variant[chosen] % lengths.shape[1]]
        return Draws(np.full(len(record), index), record, template, text_first, dropped, omitted, variant, length)

    def _omit(self, index: int, block: int, record, variant, template, omitted, length) -> None:
        """Draw the parts that are left out, and count the tokens of the others, in place."""
        most = max(map(len, self._parts[index]))
        uniform = self._random(_OMIT, self._keys[index], block).random((len(record), most))
        for number, parts in enumerate(self._parts[index]):
            mine = np.flatnonzero(template == number)
            omitted[mine] = draw_omitted(parts, uniform[mine])
            for place, lengths in enumerate(self._lengths_of_parts(index, number)):
                of_part = lengths[record[mine], variant[mine] % lengths.shape[1]]
                length[mine] += np.where(is_omitted(omitted[mine], place), 0, of_part)

    def _part_lengths(self, index: int, template: int) -> list[np.ndarray]:
        lengths = part_lengths(self.sources[index], self._parts[index][template])
        return [of_part.astype(np.int32) for of_part in lengths]

    def _document_lengths(self, index: int, template: int, way: int) -> np.ndarray:
        source = self.sources[index]
        segments, targets = self._ways[index][template][way].segments, source.config.templates[template].targets
        lengths = document_lengths(source.columns, self.vocabulary, segments, targets, self.config.clean_copies)
        return lengths.astype(np.int32)

    def _shuffle(self, index: int, epoch: int) -> np.ndarray:
        order = self._random(_ORDER, self._keys[index], epoch).permutation(self._records[index])
        return order.astype(np.int32) if len(order) < 2**31 else order

    def _first_variants(self, index: int) -> np.ndarray:
        variants, records = self._variants[index], self._records[index]
        if variants == 1:
            return np.broadcast_to(np.int16(0), records)
        offsets = self._random(_VARIANT, self._keys[index]).integers(variants, size=records)
        return offsets.astype(np.int16)

    def _random(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, *purpose])

    def document(self, draws: Draws, number: int) -> Document:
        """Compose one drawn document: bos, its segments, eos."""
        source = self.sources[draws.source[number]]
        template = source.config.templates[draws.template[number]]
        if self._parts is not None:
            parts = self._parts[draws.source[number]][draws.template[number]]
            drawn = int(draws.record[number]), int(draws.variant[number]), int(draws.omitted[number])
            return compose_parts(source, parts, *drawn)
        arranged = draws.text_first[number], draws.dropped[number]
        ways = self._ways[draws.source[number]][draws.template[number]]
        segments = next(way.segments for way in ways if way[:2] == arranged)
        record, variant = int(draws.record[number]), int(draws.variant[number])
        return compose_record(source, segments, record, variant, template.targets, self.config.clean_copies)

    # ----------------------------------------------------------------------------------------------------------- rows

    def block(self, block: int) -> Iterator[dict]:
        """Give the rows of one block, in order."""
        for number in range(len(self._packed(block)[1])):
            yield self._row(block, number)

    def rows(self, start: int = 0) -> Iterator[dict]:
        """Give all rows from row `start` on, without end."""
        block, number = self.locate(start)
        while True:
            for place in range(number, len(self._packed(block)[1])):
                yield self._row(block, place)
            block, number = block + 1, 0

    def row(self, index: int) -> dict:
        """Make row `index` of the stream. Only the lengths of the other rows of its block are looked at."""
        return self._row(*self.locate(index))

    def locate(self, index: int) -> tuple[int, int]:
        """Find the block that holds row `index`, and the row's number there. Blocks are counted by lengths alone."""
        if index < 0:
            raise ValueError(f"start={index} is not the index of a row; it must be at least 0")
        with self._counting:
            if index < self._counted.rows[0]:
                self._counted = self._from_the_start()
            counted = self._counted
            while counted.rows[-1] <= index:
                _, rows = self._packed(counted.first + len(counted.rows) - 1)
                counted.rows.append(counted.rows[-1] + len(rows))
            place = int(np.searchsorted(counted.rows, index, side="right")) - 1
            return counted.first + place, index - counted.rows[place]

    def position(self, index: int) -> dict:
        """Describe where row `index` is, in numbers that JSON holds, for `restore`."""
        with self._counting:
            block, number = self.locate(index)
            documents = self.draws_before(block)
        prints = {source.config.name: source.fingerprint[:16] for source in self.sources}
        return {
            "row": index,
            "block": block,
            "row_in_block": number,
            "documents": documents.tolist(),
            "sources": prints,
        }

    def restore(self, position: dict) -> None:
        """Count from a `position` on: rows from there are found without counting all blocks before.

        Changes no row. Earlier rows can still be asked for, at the cost of counting from the start.

        Args:
            position: of a stream of the same configuration and sources.

        Raises:
            ValueError: a position of another mixture, or of sources that changed since, by name.
        """
        for source in self.sources:
            before = position["sources"].get(source.config.name)
            if before not in (None, source.fingerprint[:16]):
                raise ValueError(
                    f"source {source.config.name!r} ({source.config.path}) is not what it was at row {position['row']}:"
                    f" its {len(source)} prepared records have fingerprint {source.fingerprint[:16]}, then {before}; "
                    "bring its files and settings back, or begin another run"
                )
        block, documents = position["block"], np.array(position["documents"], dtype=np.int64)
        drawn = block * self.block_documents
        if len(documents) != len(self.sources) or documents.sum() != drawn:
            raise ValueError(
                f"position of row {position['row']} has {documents.tolist()} documents before block {block}, but "
                f"{len(self.sources)} sources with block_documents={self.block_documents} give {drawn}; "
                "restore it with the data section it was made with"
            )
        with self._counting:
            self._counted = Counted(block, [documents], [position["row"] - position["row_in_block"]])

    def _from_the_start(self) -> Counted:
        return Counted(0, [np.zeros(len(self.sources), dtype=np.int64)], [0])

    def _counted_from(self, block: int) -> Counted:
        if block < self._counted.first:
            self._counted = self._from_the_start()
        return self._counted

    def _pack(self, block: int) -> tuple[Draws, list[list[Piece]]]:
        draws = self.draws(block)
        return draws, pack(draws.length, self.config.row_length)

    def _row(self, block: int, number: int) -> dict:
        draws, rows = self._packed(block)
        documents = [self.document(draws, piece.document).cut(piece.start, piece.stop) for piece in rows[number]]
        row = build_row(documents, self.config.row_length, self.vocabulary)
        if self.config.replaced_codes:
            replace_codes(row, self.config.replaced_codes, self.vocabulary, self._random(_REPLACE, block, number))
        return row

    def report(self, blocks: int = 8) -> dict:
        """Measure the first blocks: fill rate, rows per block, and per source records, shares and mean length.

        `shares_of_modalities` are those of all tokens that the mixture holds in the long run.
        """
        packed = [self._pack(block) for block in range(blocks)]
        draws, rows = [block for block, _ in packed], sum(len(rows) for _, rows in packed)
        source = np.concatenate([block.source for block in draws])
        length = np.concatenate([block.length for block in draws])
        tokens = self.document_shares @ tokens_by_modality(self.sources, self.config.clean_copies)
        return {
            "row_length": self.config.row_length,
            "block_documents": self.block_documents,
            "fill_rate": float(length.sum() / (rows * self.config.row_length)),
            "rows_per_block": rows / blocks,
            "shares_of_modalities": dict(
                zip(self.vocabulary.modalities, (tokens / tokens.sum()).tolist(), strict=True)
            ),
            "fingerprints": {s.config.name: s.fingerprint for s in self.sources},
            "sources": {
                s.config.name: {
                    "records": len(s),
                    "skipped": s.skipped,
                    "share_of_documents": float((source == index).mean()),
                    "share_of_tokens": float(length[source == index].sum() / length.sum()),
                    "mean_tokens": float(length[source == index].mean()) if (source == index).any() else 0.0,
                }
                for index, s in enumerate(self.sources)
            },
        }


def _block_documents(row_length: int, mean_length: float) -> int:
    """Choose the documents of a block. Its last row is half empty on average: a block of few long rows wastes much."""
    return 1024 if row_length <= 1024 else max(1024, math.ceil(256 * row_length / mean_length))


def check_sources(sources: list[TokenizedSource]) -> None:
    """Refuse sources that cannot be mixed: none, of different vocabularies, or with images kept in different ways."""
    if not sources:
        raise ValueError("sources is empty; prepare at least one TokenizedSource")
    for source in sources[1:]:
        if source.vocabulary != sources[0].vocabulary:
            raise ValueError(
                f"sources {sources[0].config.name!r} and {source.config.name!r} were tokenised by processors of "
                "different vocabularies; prepare both with the same one"
            )
    columns = [(source, *column) for source in sources for column in source.image_columns.items()]
    kinds = {(s.images, c.channels): s.config.name for s, segment, c in columns if segment.type != FEATURES}
    if len(kinds) > 1:
        ((one, channels), name), ((other, others), other_name) = list(kinds.items())[:2]
        raise ValueError(
            f"source {name!r} has images as {one} of {channels} channels, source {other_name!r} as {other} of "
            f"{others}; prepare all with one vae, or all without"
        )


def check_row_length(source: TokenizedSource, row_length: int, clean_copies: bool = False) -> None:
    """Refuse a source in which a document with a picture or a sound is longer than a row."""
    for template in source.config.templates:
        segments = template.parsed
        if all(segment.type == "text" for segment in segments):
            continue
        if source.vocabulary.has_roles:
            lengths = sum(of_part.max(axis=1) for of_part in part_lengths(source, parts_of(template)))
            _check_lengths(source, template, lengths, row_length)
            continue
        for way in ways_of(template):
            table = document_lengths(source.columns, source.vocabulary, way.segments, template.targets, clean_copies)
            _check_lengths(source, template, table.max(axis=1), row_length)


def _check_lengths(source: TokenizedSource, template: TemplateConfig, lengths: np.ndarray, row_length: int) -> None:
    """Refuse documents longer than a row, unless they are text alone.  lengths: (records,)"""
    segment = template.parsed[0]
    for record in np.flatnonzero(lengths > row_length):
        if segment.type == "document" and _is_text_alone(source, segment, int(record)):
            continue
        longest = int(lengths.max())
        raise ValueError(
            f"row_length={row_length} is shorter than the document of {source.name_of(int(record))} of "
            f"source {source.config.name!r}: {template.segments} make {int(lengths[record])} tokens, and a "
            f"picture or a sound is never cut; set row_length to {longest} or more, or tokenise into fewer "
            "tokens"
        )


def _is_text_alone(source: TokenizedSource, segment: Segment, record: int) -> bool:
    column = source.columns[segment]
    return all(
        (source.vocabulary.modality_ids(column.ids(record, variant)) == 0).all() for variant in range(column.variants)
    )


def mean_document_length(source: TokenizedSource, clean_copies: bool = False) -> float:
    """Average the tokens of a document of a source over templates, records, variants, orders and dropped captions."""
    weights = np.array([template.weight for template in source.config.templates])
    if source.vocabulary.has_roles:
        means = [mean_tokens(source, parts_of(template)).sum() for template in source.config.templates]
        return float(np.average(means, weights=weights))
    means = [
        sum(
            way.share
            * document_lengths(source.columns, source.vocabulary, way.segments, template.targets, clean_copies).mean()
            for way in ways_of(template)
        )
        for template in source.config.templates
    ]
    return float(np.average(means, weights=weights))


def compose_record(
    source: TokenizedSource,
    segments: list[Segment],
    record: int,
    variant: int,
    targets: str = "all",
    clean_copies: bool = False,
) -> Document:
    """Compose the document that some segments of a record make, see `compose`."""
    spans = [source.columns[segment].ids(record, variant) for segment in segments]
    images = images_of(source.image_columns, segments, record, variant)
    return compose(spans, images, source.vocabulary, targets, clean_copies)


# --------------------------------------------------------------------------------------------- shares of the modalities

# Documents of each arrangement that are composed to see how a source's tokens are shared by modalities.
_COMPOSED = 1024


def tokens_by_modality(sources: list[TokenizedSource], clean_copies: bool = False) -> np.ndarray:
    """Average the tokens of a document of each source by modality.  (sources, modalities)

    Markers and the begin and end of a document are text. The mean length is exact; how it is shared is that of up to
    1,024 records, which are spread over the source.
    """
    means = np.zeros((len(sources), len(sources[0].vocabulary.modalities)))
    for index, source in enumerate(sources):
        records = np.unique(np.linspace(0, len(source) - 1, _COMPOSED).astype(np.int64)).tolist()
        of_templates = sum(template.weight for template in source.config.templates)
        for template in source.config.templates:
            if source.vocabulary.has_roles:
                means[index] += template.weight / of_templates * mean_tokens(source, parts_of(template))
                continue
            for way in ways_of(template):
                arranged = way.segments, template.targets, clean_copies
                lengths = document_lengths(source.columns, source.vocabulary, *arranged)
                counts = _count_modalities(source, records, *arranged)
                share = way.share * template.weight / of_templates
                means[index] += share * lengths.mean() * counts / counts.sum()
    return means


def _count_modalities(
    source: TokenizedSource, records: list[int], segments: list[Segment], targets: str, clean_copies: bool
) -> np.ndarray:
    """Count the tokens of some records by modality.  (modalities,)"""
    counts = np.zeros(len(source.vocabulary.modalities))
    for record in records:
        document = compose_record(source, segments, record, 0, targets, clean_copies)
        counts += np.bincount(source.vocabulary.modality_ids(document.ids), minlength=len(counts))
    return counts


def weights_of_shares(
    shares: dict[str, float], sources: list[TokenizedSource], weights: np.ndarray, clean_copies: bool = False
) -> np.ndarray:
    """Scale the weights of sources, in documents, so that the modalities have these shares of all tokens.  (sources,)

    A source is of the modality, other than text, of which it has most tokens; a source of text alone is of text. The
    sources of one modality keep the ratios of their weights. The text that comes with pictures and sounds is counted.

    Raises:
        ValueError: a modality without a share or without a source, or shares that no such scaling reaches.
    """
    # The modality that each source is of.
    names, tokens = sources[0].vocabulary.modalities, tokens_by_modality(sources, clean_copies)
    beside_text = np.where(np.arange(len(names)) == 0, 0, tokens)
    main = beside_text.argmax(axis=1)
    for number, name in enumerate(names):
        if tokens[:, number].any() and name not in shares:
            raise ValueError(f"token_shares={shares} has no share of {name}, which the sources have; state it too")
    for name in shares:
        if name not in names or names.index(name) not in main:
            alone = "of text alone" if name == "text" else f"with more {name} than other codes"
            raise ValueError(f"token_shares has {name}={shares[name]}, but there is no source {alone}; add one")

    # One factor for the sources of each modality: as many unknowns as there are shares.
    numbers = [names.index(name) for name in shares]
    wanted = np.array(list(shares.values())) / sum(shares.values())
    together = np.stack([(weights[main == number] @ tokens[main == number])[numbers] for number in numbers])
    factors = np.linalg.lstsq(together.T, wanted, rcond=None)[0]
    if factors.min() <= 0 or not np.allclose(factors @ together, wanted):
        held = together / together.sum(axis=1, keepdims=True)
        described = "; ".join(
            f"the sources of {name}: " + ", ".join(f"{other} {part:.3f}" for other, part in zip(shares, parts))
            for name, parts in zip(shares, held)
        )
        raise ValueError(
            f"token_shares={shares} cannot be reached, since documents bring other modalities along ({described}); "
            "give those a larger share, or change the sources"
        )
    scale = np.zeros(len(names))
    scale[numbers] = factors
    scaled = weights * scale[main]
    # Rounded, so that ranks whose processors round unlike draw the same documents.
    return np.round(scaled / scaled.sum(), 12)


# -------------------------------------------------------------------------------------------------------------- batches

# How long the making of a batch may still take when no step waits for it any more.
SECONDS_TO_END = 5.0


class StepBatches:
    """This rank's micro-batches of every step. Their rows depend on nothing but the step.

    Step s takes rows [s * G, (s + 1) * G) of the stream, G = rows x accumulation x processes: any split of G into these
    three sees the same rows in a step. A rank makes its own rows and no others. `collate(rows, row_numbers=...)` is
    given their numbers in the stream, so the noise of diffusion that it draws for a row is the same after a resume.
    """

    def __init__(self, stream, collate: Callable, rows: int, accumulation: int, rank: int = 0, processes: int = 1):
        self.stream = stream
        self.collate = collate
        self.rows = rows
        self.accumulation = accumulation
        self.rank = rank
        self.processes = processes

    @property
    def rows_in_a_step(self) -> int:
        """G, the rows of all processes."""
        return self.rows * self.accumulation * self.processes

    def micro_batches(self, step: int) -> list[dict]:
        """Make the `accumulation` batches of one step."""
        batches = []
        for micro_batch in range(self.accumulation):
            first = step * self.rows_in_a_step + (micro_batch * self.processes + self.rank) * self.rows
            numbers = range(first, first + self.rows)
            batches.append(self.collate([self.stream.row(number) for number in numbers], row_numbers=numbers))
        return batches

    def from_step(
        self, step: int, steps: int, stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[list[dict] | None]:
        """Give the batches of steps `step`, ..., `steps - 1`, making the next step's while this one computes.

        The last item is None when `stopped` becomes true while the data are waited for: a source that has stalled must
        not keep a run from saving. An error in the data is raised here.
        """
        made: queue.Queue = queue.Queue(maxsize=1)
        abandoned = threading.Event()

        def hand_over(item) -> None:
            while not abandoned.is_set():
                try:
                    made.put(item, timeout=0.1)
                    return
                except queue.Full:
                    continue

        def work() -> None:
            for index in range(step, steps):
                if abandoned.is_set():
                    return
                try:
                    hand_over((self.micro_batches(index), None))
                except Exception as error:
                    hand_over((None, error))
                    return

        # A daemon: a process that ends does not wait for data that may never come.
        worker = threading.Thread(target=work, name="batches", daemon=True)
        worker.start()
        try:
            for _ in range(step, steps):
                while True:
                    try:
                        batches, error = made.get(timeout=0.1)
                        break
                    except queue.Empty:
                        if stopped():
                            yield None
                            return
                if error is not None:
                    raise error
                yield batches
        finally:
            abandoned.set()
            # An interpreter that ends while a thread is inside of torch aborts.
            worker.join(timeout=SECONDS_TO_END)
