"""What people do with TGI's own `text-generation` client. Run by its interpreter: it needs an old huggingface_hub.

python client_of_tgi.py URL: one JSON object of everything that was seen.
"""

from __future__ import annotations

import json
import sys

from text_generation import Client
from text_generation.errors import ValidationError


def main(url: str) -> dict[str, object]:
    client = Client(url, timeout=60)
    whole = client.generate(
        "The capital of France is", max_new_tokens=4, decoder_input_details=True, top_n_tokens=2
    )
    stopped = client.generate("1, 2, 3,", max_new_tokens=20, stop_sequences=["5"])
    best = client.generate("Once", max_new_tokens=4, do_sample=True, best_of=2)
    events = list(client.generate_stream("The capital of France is", max_new_tokens=4))
    seeded = [
        client.generate("Once", max_new_tokens=8, do_sample=True, seed=7).generated_text for _ in range(2)
    ]
    chat = client.chat([{"role": "user", "content": "Say hello."}], max_tokens=3, temperature=0.0)
    try:
        client.generate("x", max_new_tokens=0)
        error = ""
    except ValidationError as refused:
        error = str(refused)
    return {
        "text": whole.generated_text,
        "tokens": whole.details.generated_tokens,
        "finish": whole.details.finish_reason.value,
        "prefill": len(whole.details.prefill),
        "top": [len(top) for top in whole.details.top_tokens],
        "stopped": stopped.generated_text,
        "stop_reason": stopped.details.finish_reason.value,
        "best_of": len(best.details.best_of_sequences or []),
        "streamed": "".join(event.token.text for event in events),
        "last": events[-1].generated_text,
        "last_details": events[-1].details.generated_tokens,
        "seeded": seeded,
        "chat": chat.choices[0].message.content,
        "error": error,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
