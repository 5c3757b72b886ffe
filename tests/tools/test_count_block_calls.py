"""The block loop stays short: the committed script counts its calls."""

from tools.count_block_calls import LIMIT, count_calls, main


def test_a_block_takes_few_calls(capsys):
    assert main() == 0
    assert f"(at most {LIMIT})" in capsys.readouterr().out


def test_the_script_counts_the_whole_block():
    """A count that misses parts of the block would pass any limit."""
    names = {function for _, function in count_calls()}
    assert {"attend", "Tokens.apply_grouping", "DenseAdapters.beside_ffn", "Mlp.forward"} <= names
