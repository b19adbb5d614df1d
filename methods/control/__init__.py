"""Control tokens: method control.

Conditional training after Korbak et al., "Pretraining Language Models with Human Preferences",
arXiv:2302.08582, with several attributes as in a UCL COMP0087 project (2023). Every text is
labelled by scorers (attributes.py), its values stand before it as tokens of their own, and the
model learns the text and its end:

    L = mean over tokens of -log p(x_t | c, x_<t)        c: the control tokens, in nats

With c the text is conditioned; without, it is not (a share of the training texts has no tokens).
Classifier-free guidance of scale g (Ho and Salimans, arXiv:2207.12598; for language models Sanchez
et al., arXiv:2306.17806) draws from

    z = z_unconditioned + g (z_conditioned - z_unconditioned)

A row is plain text, no chat: start, start, control tokens, text, end of turn. The start token is
repeated: one copy is in the shared context, one in each branch, so that even an unconditional
branch without a prompt has a token.

Differences from the project's code:
- Pretrained weights and an adapter; random weights only with --from_scratch (the project's models
  all start from them).
- Tokens stand first, also where a prompt follows (there they stand after it, where the training
  data never had them).
- Scorer and threshold are the same for training and evaluation; VADER has a neutral band (there
  ties are negative).
- Spare special tokens of the tokenizer are used if there are enough of them, else rows are added;
  all start at the mean row.
- Control tokens are never generated: their logits are set to -1e9 in any decoding.
- The learning rate is constant (there a cosine after 1 % of warm-up), and all models get equally
  many updates.
- All texts of a document are in one split; equal texts are kept once; prompts are left-padded and
  not scored.
"""
