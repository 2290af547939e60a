import numpy as np

from vsa_optax.kernels import blocks, signs, trit_blocks


def test_each_block_and_round_has_words_of_its_own():
    runs = blocks.split_into_blocks(5 * 64 + 32, 64)
    of_runs = trit_blocks.random_words(signs.stream(0, 1, 2), runs, rounds=2)
    assert [[words.shape for words in of_run] for of_run in of_runs] == [[(5, 2)] * 2, [(1, 1)] * 2]
    words = np.concatenate([np.ravel(words) for of_run in of_runs for words in of_run])
    assert len(set(words.tolist())) == 2 * (5 * 2 + 1)
