package sim

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/fnv"
	"math"
	"strconv"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

func itoa(n int) string { return strconv.Itoa(n) }

// PromptHash returns the first 16 hex digits of the SHA-256 of the prompt in a
// request body: the bytes of its messages, else its prompt, else its input,
// exactly as they stand there. Every text that the engine answers begins with
// "sim:<hash> ", so that an answer can be matched with its request.
func PromptHash(body []byte) (string, error) {
	var f fields
	if err := json.Unmarshal(body, &f, lenient()); err != nil {
		return "", fmt.Errorf("hash prompt: %w", err)
	}
	v := f.promptField()
	if len(v) == 0 {
		return "", errors.New("hash prompt: neither messages nor prompt nor input")
	}
	return hashValue(v), nil
}

func hashValue(v jsontext.Value) string {
	sum := sha256.Sum256(v)
	return hex.EncodeToString(sum[:8])
}

// Embedding returns the vector of dim numbers that the engine answers for the
// prompt hash, of length 1, each number exact in float32. When input is a list,
// item i > 0 has the vector of the hash "<hash>/<i>".
func Embedding(hash string, dim int) []float64 {
	v := make([]float64, dim)
	state := hash64(hash)
	var norm float64
	for i := range v {
		state = mix(state)
		v[i] = float64(int64(state)) / (1 << 63)
		norm += v[i] * v[i]
	}
	norm = math.Sqrt(norm)
	for i := range v {
		v[i] = float64(float32(v[i] / norm))
	}
	return v
}

func hash64(s string) uint64 {
	h := fnv.New64a()
	h.Write([]byte(s))
	return h.Sum64()
}

// appendText appends the answer of one choice: the mark, then words up to
// length bytes in all. The mark is never cut.
func appendText(b []byte, hash string, choice, length int) []byte {
	const words = "the mill turns by water and grinds what is brought to it in the order in which it came " +
		"while stones wear down race runs full wheel stands still until somebody opens gate again "
	start := len(b)
	b = append(b, "sim:"...)
	b = append(b, hash...)
	b = append(b, ' ')
	state := hash64(hash) + uint64(choice)
	for len(b)-start < length {
		state = mix(state)
		// A whole word of the list, found from a random place in it.
		i := int(state % uint64(len(words)-1))
		for i > 0 && words[i-1] != ' ' {
			i--
		}
		j := i
		for words[j] != ' ' {
			j++
		}
		b = append(b, words[i:j+1]...)
	}
	return b[:max(start+min(length, len(b)-start), start+len("sim: ")+len(hash))]
}
