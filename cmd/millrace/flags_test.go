package main

import (
	"bytes"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// everyCommand visits the commands that do something, each of a tree of its own.
func everyCommand(t *testing.T, visit func(t *testing.T, path []string)) {
	t.Helper()
	var walk func(c *cobra.Command, path []string)
	walk = func(c *cobra.Command, path []string) {
		if c.Runnable() {
			t.Run(strings.Join(path, " "), func(t *testing.T) { visit(t, path) })
		}
		for _, sub := range c.Commands() {
			walk(sub, append(path[:len(path):len(path)], sub.Name()))
		}
	}
	walk((&app{}).root(), nil)
}

// command finds the command at path in a new tree.
func command(t *testing.T, path []string) *cobra.Command {
	t.Helper()
	c, _, err := (&app{}).root().Find(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.ParseFlags(nil); err != nil { // brings the flags of the commands above it
		t.Fatal(err)
	}
	return c
}

// sample is a value that a flag takes and that is not its default.
func sample(f *pflag.Flag) string {
	switch f.Value.Type() {
	case "bool":
		return "true"
	case "duration":
		return "17m0s"
	case "int", "int64", "uint64":
		return "17"
	case "stringArray":
		return "one, two"
	}
	return "some text"
}

// TestEveryFlagHasAVariable: MILLRACE_X sets --x, unless --x was given.
func TestEveryFlagHasAVariable(t *testing.T) {
	everyCommand(t, func(t *testing.T, path []string) {
		command(t, path).Flags().VisitAll(func(f *pflag.Flag) {
			if f.Name == "help" {
				return
			}
			name, value := "MILLRACE_"+strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_")), sample(f)
			env := func(s string) (string, bool) { return value, s == name }
			c := command(t, path)
			if err := fromEnv(c.Flags(), env); err != nil {
				t.Fatalf("%s=%s: %v", name, value, err)
			}
			want := strings.ReplaceAll(value, "one, two", "[one,two]")
			if got := c.Flag(f.Name).Value.String(); got != want || got == f.DefValue {
				t.Errorf("%s=%s makes --%s %s", name, value, f.Name, got)
			}
			c = command(t, path)
			if err := c.Flags().Set(f.Name, f.DefValue); f.Value.Type() != "stringArray" && err != nil {
				t.Fatal(err)
			}
			if err := fromEnv(c.Flags(), env); err != nil {
				t.Fatal(err)
			}
			if got := c.Flag(f.Name).Value.String(); f.Value.Type() != "stringArray" && got != f.DefValue {
				t.Errorf("%s=%s overrides --%s %s", name, value, f.Name, f.DefValue)
			}
		})
	})
}

// valueName is a type as pflag writes it, or a name of our own.
var valueName = regexp.MustCompile(`^([a-z]*|[A-Z:]+)$`)

// TestHelp: each command explains itself and each of its flags.
func TestHelp(t *testing.T) {
	everyCommand(t, func(t *testing.T, path []string) {
		var out, errs bytes.Buffer
		code := run(t.Context(), append(path[:len(path):len(path)], "--help"), stdio{os.Stdin, &out, &errs})
		if code != exitOK || errs.Len() > 0 {
			t.Fatalf("exit code %d, %s", code, &errs)
		}
		for _, want := range []string{"Usage:", "millrace " + strings.Join(path, " ")} {
			if !strings.Contains(out.String(), want) {
				t.Errorf("no %q in\n%s", want, &out)
			}
		}
		command(t, path).Flags().VisitAll(func(f *pflag.Flag) {
			if !f.Hidden && (f.Usage == "" || !strings.Contains(out.String(), "--"+f.Name)) {
				t.Errorf("nothing is said of --%s", f.Name)
			}
			if name, _ := pflag.UnquoteUsage(f); !valueName.MatchString(name) { // backquotes in the usage make it
				t.Errorf("help shows --%s %s", f.Name, name)
			}
		})
	})
}
