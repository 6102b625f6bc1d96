package main

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// model is what every line asks for.
const model = "bench"

// filler makes a line about 1,000 bytes long.
var filler = strings.Repeat("some words of a prompt, ", 33)

// body is that of the i-th of n lines. A hundred lines share the beginning of their prompts, and lie apart in the file.
func body(i, n int) string {
	return fmt.Sprintf(`{"model":"%s","messages":[{"role":"user","content":"%06d %s%d"}],"max_tokens":100}`, model, i*7919%n/100, filler, i)
}

// input writes n lines, always the same, and returns the file's name.
func (c *config) input(n int) (name string, err error) {
	name = filepath.Join(c.dir, fmt.Sprintf("%d.jsonl", n))
	if _, err := os.Stat(name); err == nil {
		return name, nil
	}
	f, err := os.Create(name)
	if err != nil {
		return "", fmt.Errorf("write the input: %w", err)
	}
	w := bufio.NewWriterSize(f, 1<<20)
	for i := range n {
		fmt.Fprintf(w, `{"custom_id":"request-%08d","method":"POST","url":"/v1/chat/completions","body":%s}`+"\n", i, body(i, n))
	}
	err = w.Flush() // it keeps the first error
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return "", fmt.Errorf("write the input: %w", err)
	}
	return name, nil
}
