// Package sim is a simulated vLLM: the same routes, bodies, errors, metrics and
// ways to fail over real HTTP, at a speed you choose.
//
// The engine is a step-based scheduler after vLLM's V1: continuous batching,
// chunked prefill, KV blocks with a prefix cache, pre-emption by recomputation.
// What it answers is a deterministic text that carries a hash of the prompt, so
// that a test can tell which request an answer belongs to.
//
// It copies vLLM 0.32.0 (Python frontend). What is known to differ:
//   - a token is BytesPerToken bytes of text, and there is one chat template;
//   - logprobs, tools, stop strings, response_format, echo and the sampling
//     values are checked at most, never obeyed;
//   - a stream sends its text in one chunk, when all of it is there;
//   - only prompts are shared by content in the prefix cache: an answer that
//     comes back inside a later prompt is not a hit;
//   - pydantic's messages are exact for the recorded cases, close elsewhere;
//   - /metrics has every vllm:* family, but no python_*, process_* or http_*.
package sim
