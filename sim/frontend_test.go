package sim

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"
)

// TestFrontends: what each of vLLM's servers does in its own way, as recorded.
func TestFrontends(t *testing.T) {
	const schema = `, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "wrong"}}}`
	bodies := map[string]string{
		"list":         `[]`,
		"cut":          chat(strings.Repeat("x", 200), `, "max_tokens": 100`), // of 256 tokens
		"above":        chat("x", `, "max_tokens": 1000`),
		"schema":       chat("x", schema),
		"good schema":  chat("x", strings.Replace(schema, "wrong", "object", 1)),
		"schema, text": chat("x", strings.Replace(schema, "json_schema", "text", 1)),
	}
	for frontend, wants := range map[Frontend]map[string]string{
		FrontendPython:   {"list": "400", "cut": "length", "above": "400", "schema": "400 Grammar error: Invalid type: wrong"},
		FrontendPython26: {"list": "500 'list' object has no attribute 'get'", "cut": "400 You passed 2", "above": "400", "schema": "400 Grammar"},
		FrontendRust:     {"list": "400", "cut": "length", "above": "length", "schema": "null"},
	} {
		r := serve(t, Config{Frontend: frontend, MaxModelLen: 256, BytesPerToken: 1})
		wants["good schema"], wants["schema, text"] = "length", "length"
		for name, want := range wants {
			var got string
			p := r.post(chatPath, strings.Replace(bodies[name], "}]", "}], \"ignore_eos\": true", 1))
			switch status, says, _ := strings.Cut(want, " "); {
			case p.status != http.StatusOK:
				if fmt.Sprint(p.status) != status || !strings.Contains(string(p.body), says) {
					t.Errorf("%s, %s: %d %s, want %s", frontend, name, p.status, p.body, want)
				}
			default:
				var a struct {
					Choices []struct {
						Message struct {
							Content *string `json:"content"`
						} `json:"message"`
						Finish string `json:"finish_reason"`
					} `json:"choices"`
				}
				if err := json.Unmarshal(p.body, &a, lenient()); err != nil {
					t.Fatal(err)
				}
				if got = a.Choices[0].Finish; a.Choices[0].Message.Content == nil {
					got = "null"
				}
				if got != want {
					t.Errorf("%s, %s: %s %s, want %s", frontend, name, got, p.body, want)
				}
			}
		}
		if told := strings.Contains(string(r.get("/metrics").body), "engine_sleep_state"); told == (frontend == FrontendRust) {
			t.Errorf("%s: engine_sleep_state is told: %v", frontend, told)
		}
		r.Kill()
		if p := r.post(chatPath, bodies["good schema"]); (p.err != nil) != (frontend == FrontendRust) {
			t.Errorf("%s: a dead engine says %d, error %v", frontend, p.status, p.err)
		}
	}
}

// TestAsleep: an engine that sleeps looks well, says that it sleeps, answers nothing, and goes on when it is awake.
func TestAsleep(t *testing.T) {
	r := serve(t, Config{DevMode: true, Faults: Faults{Asleep: true}})
	wait := r.spread(chatPath, []string{chat("x", "")})
	for path, says := range map[string]string{"/health": "", "/is_sleeping": `{"is_sleeping":true}`, "/metrics": `sleep_state="awake"} 0.0`} {
		if p := r.get(path); p.status != http.StatusOK || !strings.Contains(string(p.body), says) {
			t.Errorf("%s says %d %s", path, p.status, p.body)
		}
	}
	if err := r.SetFaults(Faults{}); err != nil {
		t.Fatal(err)
	}
	if p := wait()[0]; p.status != http.StatusOK {
		t.Errorf("%d %s", p.status, p.body)
	}
	if p := r.get("/is_sleeping"); string(p.body) != `{"is_sleeping":false}` {
		t.Errorf("it says %s", p.body)
	}
}

// TestAnyModel: an engine that does not look at the name of a model.
func TestAnyModel(t *testing.T) {
	r := serve(t, Config{AnyModel: true})
	if p := r.post(chatPath, `{"model": "another", "messages": [{"role": "user", "content": "x"}]}`); p.status != http.StatusOK {
		t.Errorf("%d %s", p.status, p.body)
	}
}
