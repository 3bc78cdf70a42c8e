"""Text in, blocks of tokens out: corpora, tokenizers, packing."""

from multimatrix.data.corpus import Corpus, load_corpus, read_documents
from multimatrix.data.packing import BlockDataset, OrderedBlocks, PackedText, pack
from multimatrix.data.prepare import PreparedText, prepare_text
from multimatrix.data.tokenizer import load_tokenizer

__all__ = [
    "BlockDataset",
    "Corpus",
    "OrderedBlocks",
    "PackedText",
    "PreparedText",
    "load_corpus",
    "load_tokenizer",
    "pack",
    "prepare_text",
    "read_documents",
]
