package worker

import (
	"bytes"
	"strconv"

	"github.com/go-json-experiment/json/jsontext"

	"millrace/proto"
	"millrace/worker/load"
)

// demand is what a body asks for, as far as the answer can be held against it.
type demand struct {
	tokens int // of the output of a choice, at most; 0: it sets no limit
	n      int // choices for each input
	inputs int // prompts of a completion, or texts to embed; 1 where there is no list of them
}

const (
	mostTokens = 1 << 20 // that a body can set
)

// readDemand reads a body; what it cannot read is not asked for.
func readDemand(body []byte) demand {
	a := demand{n: 1, inputs: 1}
	d := jsontext.NewDecoder(bytes.NewBuffer(body), lenient) // in place, see readReply
	if d.PeekKind() != '{' {
		return a
	}
	newer := false
	_ = members(d, func(name string, kind jsontext.Kind) error { // what comes before an error counts
		switch name {
		case "prompt", "input":
			if kind == '[' {
				return a.readInputs(d)
			}
		case "n", "max_tokens", "max_completion_tokens", "max_output_tokens":
			v, err := d.ReadValue()
			i, no := strconv.Atoi(string(v))
			switch {
			case err != nil || no != nil || i <= 0:
			case name == "n":
				a.n = min(i, 128)
			case name != "max_tokens" || !newer: // which max_completion_tokens replaces
				a.tokens, newer = min(i, mostTokens), name != "max_tokens"
			}
			return err
		}
		return d.SkipValue()
	})
	return a
}

// readInputs counts the inputs in a list: texts, and lists of tokens. Tokens are those of one, and messages make one.
func (a *demand) readInputs(d *jsontext.Decoder) error {
	if _, err := d.ReadToken(); err != nil {
		return err
	}
	n := 0
	for k := d.PeekKind(); k != ']'; k = d.PeekKind() {
		if k == '"' || k == '[' {
			n++
		}
		if err := d.SkipValue(); err != nil {
			return err
		}
	}
	a.inputs = max(n, 1)
	_, err := d.ReadToken()
	return err
}

// wish is what a body asks for, within what any engine does.
func (a demand) wish() load.Wish {
	tokens := a.tokens
	if tokens == 0 {
		tokens = load.NoMaxTokens
	}
	sequences := a.n * min(a.inputs, 1<<10)
	return load.Wish{Most: tokens * sequences, Sequences: sequences}
}

// answers is how many choices or items an answer at a URL has to have; 0: that cannot be told.
func (a demand) answers(url string) int {
	switch url {
	case "/v1/chat/completions":
		return a.n
	case "/v1/completions":
		return a.n * a.inputs
	case "/v1/embeddings":
		return a.inputs
	}
	return 0
}

// against holds a good answer at a URL against what the body of its line asks for. One with fewer choices or embeddings than were asked for is
// none. Of one that ended at a limit of tokens, though with fewer than the body allows, the engine cut the rest off,
// since prompt and output together exceed its context (vLLM's Rust frontend, Python from 0.32).
func (v verdict) against(a demand, url string) verdict {
	if want := a.answers(url); v.parts < want {
		return verdict{class: classRetry, code: proto.CodeBadResponse, id: v.id,
			message: "HTTP 200 with " + strconv.Itoa(v.parts) + " of the " + strconv.Itoa(want) + " answers that the body asks for"}
	}
	v.cut = v.limited && a.tokens > 0 && v.usage.Counted && v.usage.Completion < int64(a.tokens*max(v.parts, 1))
	return v
}
