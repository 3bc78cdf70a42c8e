"""A corpus: documents from files, folders or hub data sets, without duplicates, split by document.

Documents are ordered by the hash of their text, never by where they were found. So a corpus, its split and
its hash are the same on every machine and in every order of the files, and a text that occurs twice cannot be
on both sides of the split.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import lzma
import platform
import sysconfig
import tokenize
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from multimatrix.errors import InputError, one_line

STDLIB = "stdlib"
HUB = "hub:"
FORMATS = (".txt", ".md", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".xz", ".zst")
SUPPORTED = f"{', '.join(FORMATS)}, each optionally with {', '.join(COMPRESSIONS)}"


@dataclass(frozen=True)
class Corpus:
    """Documents, split in two.

    Attributes:
        name: where they came from, for tables and logs.
        sha256: hash over all documents; equal for equal contents, whatever the order of the files.
        train: documents to train on, in the order of their hashes.
        validation: documents held out, in the order of their hashes.
        duplicates: documents dropped because another has the same text, up to white space at the ends.
    """

    name: str
    sha256: str
    train: tuple[str, ...]
    validation: tuple[str, ...]
    duplicates: int


def load_corpus(sources: Sequence[str] = (), *, validation_fraction: float = 0.1) -> Corpus:
    """Read `sources`, drop duplicates and empty documents, and hold some documents out for validation.

    Args:
        sources: files, folders (searched recursively) and hub data sets, mixed at will; none means "stdlib".
            "stdlib": the Python standard library, one document a module. It differs between Python versions:
            show the name and the hash, and never compare losses across them.
            Files: .txt and .md are one document each; .jsonl and .parquet one document a row, from the field
            `text` or else the only field of strings; "path.jsonl::field" chooses another. A row that holds
            null there is no document. Each may be compressed: .gz, .xz, .zst.
            Hub: "hub:owner/name", "hub:owner/name:config", "hub:owner/name::field"; the split named "train".
        validation_fraction: share of the characters to hold out, in (0, 0.5]. Whole documents are held out,
            so few or very unequal documents give another share.

    Raises:
        InputError: a source cannot be read or means nothing, there are fewer than two different documents, or
            `validation_fraction` is out of range.
    """
    if not 0 < validation_fraction <= 0.5:
        raise InputError(f"validation_fraction must be above 0 and at most 0.5, got {validation_fraction}")
    name, found = read_documents(sources)
    documents = _without_duplicates(found)
    duplicates = len(found) - len(documents)
    if len(documents) == 1:
        dropped = f" ({duplicates} more had the same text)" if duplicates else ""
        raise InputError(
            f"a validation split needs at least 2 documents, got 1{dropped}; "
            "split the text into several files or a jsonl"
        )
    held_out = _choose_validation(documents, validation_fraction)
    digest = hashlib.sha256()
    for text in documents:
        digest.update(_hash(text))
    return Corpus(
        name=name,
        sha256=digest.hexdigest(),
        train=tuple(text for i, text in enumerate(documents) if i not in held_out),
        validation=tuple(text for i, text in enumerate(documents) if i in held_out),
        duplicates=duplicates,
    )


def read_documents(sources: Sequence[str] = ()) -> tuple[str, list[str]]:
    """The name of `sources`, which are those of `load_corpus`, and their documents as they come.

    Documents of white space alone are left out.

    Raises:
        InputError: a source cannot be read or means nothing, or there is no text.
    """
    found: list[str] = []
    for source in _listed(sources):
        found.extend(text for text in _read_source(source) if text.strip())
    name = source_names(sources)
    if not found:
        raise InputError(f"{name} holds no text: no document in it has more than white space")
    return name, found


def source_names(sources: Sequence[str] = ()) -> str:
    """What the sources are called, for tables and logs."""
    names = [_source_name(source) for source in _listed(sources)]
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def fingerprint(sources: Sequence[str] = ()) -> list[Any]:
    """What decides which documents the sources hold, found without reading them as documents.

    Files by the hash of their bytes and how these are read, whatever they are called; a hub data set by its own
    fingerprint.

    Raises:
        InputError: a source cannot be read or means nothing.
    """
    found: list[Any] = []
    for source in _listed(sources):
        if source == STDLIB:
            found.append([STDLIB, hashlib.sha256("\0".join(_read_stdlib()).encode()).hexdigest()])
        elif source.startswith(HUB):
            rows, field = _load_hub(source)
            found.append([HUB, rows._fingerprint, field])
        else:
            files, field = _files(source)
            found += sorted([field, _format(file), file.suffix.lower(), _file_hash(file)] for file in files)
    return found


def _listed(sources: Sequence[str]) -> Sequence[str]:
    return (sources,) if isinstance(sources, str) else sources or (STDLIB,)


def _file_hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or one_line(error)}") from error


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _without_duplicates(documents: Iterable[str]) -> list[str]:
    """One document of each text, in the order of the hashes of the texts without white space at the ends."""
    kept: dict[bytes, str] = {}
    for text in documents:
        key = _hash(text.strip())
        kept[key] = min(text, kept.get(key, text))  # which of the twins stays must not depend on the order
    return [kept[key] for key in sorted(kept)]


def _choose_validation(documents: Sequence[str], fraction: float) -> set[int]:
    """Indices to hold out: in order, each document that still fits into the share of characters asked for.

    A fraction of at most 0.5 never takes all of them. Where none fits, the shortest is taken.
    """
    room = fraction * sum(len(text) for text in documents)
    chosen = set()
    for i, text in enumerate(documents):
        if len(text) <= room:
            chosen.add(i)
            room -= len(text)
    return chosen or {min(range(len(documents)), key=lambda i: len(documents[i]))}


def _source_name(source: str) -> str:
    if source == STDLIB:
        return f"python-{platform.python_version()}-stdlib"
    location = source.removeprefix(HUB).partition("::")[0]
    if source.startswith(HUB):
        return location
    path = Path(location)
    return path.resolve().name if path.is_dir() else path.name


def _read_source(source: str) -> Iterable[str]:
    """The documents of one source."""
    if source == STDLIB:
        return _read_stdlib()
    if source.startswith(HUB):
        return _read_hub(source)
    files, field = _files(source)
    return (text for file in files for text in _read_file(file, field))


def _files(source: str) -> tuple[list[Path], str]:
    """The files of a source that is a file or a folder, and the field that was chosen."""
    location, _, field = source.partition("::")
    path = Path(location)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _format(file) and file.is_file())
        if not files:
            raise InputError(f"the folder {path} holds no supported file; supported are {SUPPORTED}")
        return files, field
    if not path.exists():
        raise InputError(f"{path} does not exist; a data set of the hub is written {HUB}owner/name")
    if _format(path) is None:
        raise InputError(f"{path} is of no supported kind; supported are {SUPPORTED}")
    if field and _format(path) in (".txt", ".md"):
        raise InputError(f"{path} is one document and has no fields; leave out ::{field}")
    return [path], field


def _read_stdlib() -> Iterator[str]:
    """Top-level modules, and the help topics where they are installed."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    # _sysconfigdata_*.py is written when an interpreter is built and holds the folders of that machine
    paths = [path for path in paths if not path.name.startswith("_sysconfigdata")]
    if not paths:
        raise InputError("this Python carries no sources of its standard library; name files of your own instead")
    for path in paths:
        with tokenize.open(path) as file:  # obeys the encoding that the file declares
            yield file.read()
    try:
        topics: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    yield from topics.values()


def _read_hub(source: str) -> Iterable[str]:
    rows, field = _load_hub(source)
    texts = [key for key, kind in rows.features.items() if getattr(kind, "dtype", "") in ("string", "large_string")]
    field = _choose_field(source, field, list(rows.features), texts)
    if field not in texts:
        raise InputError(f"{source} holds no text in the field {field!r}; those that do: {', '.join(texts) or 'none'}")
    return (text for text in rows[field] if text is not None)


def _load_hub(source: str) -> tuple[Any, str]:
    """The rows of a data set, and the field that was chosen."""
    import datasets  # slow to import, and only this needs it

    location, _, field = source.removeprefix(HUB).partition("::")
    name, _, config = location.partition(":")
    datasets.utils.logging.disable_progress_bar()  # what is said while we read is ours to say
    try:
        return datasets.load_dataset(name, config or None, split="train"), field
    except Exception as error:  # what it raises is not documented: connection, name, config, split, format
        raise InputError(f"{source} cannot be loaded from the hub: {one_line(error)}") from error


def _format(path: Path) -> str | None:
    """The ending that says what the file is, without that of the compression; None if it is not supported."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


def _read_file(path: Path, field: str) -> Iterable[str]:
    if _format(path) == ".parquet":
        return _read_parquet(path, _read_bytes(path), field)
    return _read_jsonl(path, field) if _format(path) == ".jsonl" else [_read_text(path)]


def _read_text(path: Path) -> str:
    try:
        text = _read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 at byte {error.start}; convert it to UTF-8") from error
    return text.removeprefix("\ufeff")


def _read_bytes(path: Path) -> bytes:
    """What the file holds, unpacked if its name ends in .gz, .xz or .zst; InputError where it is cut or damaged."""
    try:
        data = path.read_bytes()
        match path.suffix.lower():
            case ".gz":
                return gzip.decompress(data)
            case ".xz":
                return lzma.decompress(data)
            case ".zst":
                return _decompress_zstd(data)
        return data
    except OSError as error:  # gzip.BadGzipFile is one
        raise InputError(f"{path} cannot be read: {error.strerror or one_line(error)}") from error
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{path} is damaged or cut short: {one_line(error)}") from error


def _decompress_zstd(data: bytes) -> bytes:
    """All frames of `data`; the one-call functions of zstandard read the first and accept half of it.

    Raises:
        EOFError: the data is damaged or cut short.
    """
    import zstandard  # nothing else needs it

    parts = []
    while data:
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            parts.append(frame.decompress(data))
        except zstandard.ZstdError as error:
            raise EOFError(one_line(error)) from error
        if not frame.eof:
            raise EOFError("the last frame has no end")
        data = frame.unused_data
    return b"".join(parts)


def _choose_field(source: str, asked: str, fields: Sequence[str], texts: Sequence[str]) -> str:
    """The field that holds the documents: the one asked for, else `text`, else the only one of `texts`."""
    if asked and asked not in fields:
        raise InputError(f"{source} has no field {asked!r}; it has {', '.join(fields) or 'none'}")
    if asked or "text" in fields:
        return asked or "text"
    if len(texts) == 1:
        return texts[0]
    raise InputError(
        f"{source} has no field 'text' and {len(texts)} fields of strings "
        f"among {', '.join(fields) or 'none'}; choose one: {source}::field"
    )


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number, from 1, and object of every line of a jsonl file that is not empty; the file may be packed.

    Raises:
        InputError: it cannot be read, or a line is no JSON object.
    """
    for number, line in enumerate(_read_text(path).split("\n"), start=1):  # splitlines would also split inside strings
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"row {number} of {path} is not JSON: {one_line(error)}") from error
        if not isinstance(row, dict):
            raise InputError(f'row {number} of {path} is not a JSON object; write one a line, as {{"text": "..."}}')
        yield number, row


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    chosen = ""
    for number, row in read_rows(path):
        chosen = chosen or _choose_field(str(path), field, list(row), [k for k, v in row.items() if isinstance(v, str)])
        document = row.get(chosen, ...)
        if document is None:
            continue
        if not isinstance(document, str):
            raise InputError(f"row {number} of {path} has no string in the field {chosen!r}")
        if not document.isascii() and any("\ud800" <= c <= "\udfff" for c in document):
            raise InputError(f"row {number} of {path} holds half of a surrogate pair, which is no character")
        yield document


def _read_parquet(path: Path, data: bytes, field: str) -> list[str]:
    try:
        schema = pq.read_schema(pa.BufferReader(data))
        texts = [
            column.name for column in schema if pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        ]
        field = _choose_field(str(path), field, schema.names, texts)
        if field not in texts:
            raise InputError(f"{path} holds {schema.field(field).type} in the column {field!r}, not strings")
        column = pq.read_table(pa.BufferReader(data), columns=[field]).column(field)
        return [text for text in column.to_pylist() if text is not None]
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a readable parquet file: {one_line(error)}") from error
