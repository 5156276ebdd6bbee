import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from transmla.evaluate.logprobs import pair_scores, token_nll
from transmla.modeling.head import model_head


@pytest.mark.parametrize("chunk", [1, 7, 12, 1000, None])
def test_chunks_do_not_change_the_loss(llama, windows, chunk):
    with torch.inference_mode():
        expected = torch.nn.functional.cross_entropy(
            llama(windows).logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten(), reduction="none"
        )
        nll = token_nll(llama, windows, chunk=chunk)
    # Measured 1e-6: a matrix product of another height sums in another order.
    torch.testing.assert_close(nll, expected.view(5, 12), rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, None])
def test_pair_scores_are_the_softmax_formulas(llama, deepseek, windows, chunk):
    with torch.inference_mode():
        scores = pair_scores(llama, deepseek, windows, chunk=chunk)
        p = llama(windows).logits[:, :-1].double().softmax(-1)
        q = deepseek(windows).logits[:, :-1].double().softmax(-1)
    targets = windows[:, 1:, None]
    torch.testing.assert_close(scores.kl.double(), (p * (p / q).log()).sum(-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.source_nll.double(), -p.gather(-1, targets).log()[..., 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.converted_nll.double(), -q.gather(-1, targets).log()[..., 0], rtol=0, atol=1e-5)
    assert torch.equal(scores.agrees, p.argmax(-1) == q.argmax(-1))
    assert scores.kl.mean() > 0


def test_a_model_does_not_diverge_from_itself(deepseek, windows):
    with torch.inference_mode():
        scores = pair_scores(deepseek, deepseek, windows)
    assert scores.kl.abs().max() == 0
    assert scores.agrees.all()


SIZES = {
    "vocab_size": 83,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    "model",
    [
        GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=0.25)),
        Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.01)),
    ],
    ids=["scaled", "capped"],
)
def test_the_head_is_all_that_the_model_does_after_its_decoder(model):
    tokens = torch.arange(9)[None]
    decoder = model.eval().get_decoder()
    with torch.inference_mode():
        head = model_head(model)
        logits = head(decoder(input_ids=tokens).last_hidden_state[0])
        torch.testing.assert_close(logits, model(tokens).logits[0])
        bare = model.get_output_embeddings()(decoder(input_ids=tokens).last_hidden_state[0])
    assert not torch.allclose(logits, bare)
    assert model.get_decoder() is decoder
