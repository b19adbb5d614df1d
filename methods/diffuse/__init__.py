"""Forcing diffuse distributions: method diffuse.

"Forcing Diffuse Distributions out of Language Models", arXiv:2404.10859 (COLM 2024). For a request
x, targets y with a wanted distribution w(y), and the model's probability p(y | x) of the whole
token sequence of y,

    L(x) = - sum_y w(y) log p(y | x) = KL(w || p) + H(w)          in nats, so H(w) is the floor

One tree holds a request with all its targets: they share the request and every common prefix (a
token trie), and a shared token carries the sum of its targets' weights. That is the same loss as
one row per target, to rounding.

A prompt file is a JSON object: `request` (the user message), `response` (a prefix of the answer, or
several), `targets`, and optionally `weights` (default: uniform; they are normalised) and `eos`
(default true: the end token is learnt, too).

Differences from the paper's code:
- Targets are tokenised apart from the request and end with the template's own end-of-turn token.
- Files are checked: unknown keys, empty or equal targets, weights, and token sequences that start
  one another.
- Several response prefixes are all learnt at once, each with its share of the weight (the floor is
  then H(w) + ln R for R prefixes); the code draws one per target and pass, which has the same mean.
- `batch_size` only bounds memory: it is the number of targets computed at a time, by default all.
- Early stopping looks at fresh losses, measured after a pass, and every prompt must be within
  (1 + gamma) H(w); the code adds up losses from before and after the updates of the pass.
- Everything is seeded, and files are taken in the order of their names; the order of prompts is
  drawn every pass.
- `load_model` starts from `ckpt_dir`; sampling needs `--mode`, and draws as many as asked for (the
  code drops a remainder).
"""
