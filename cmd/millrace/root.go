package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/lmittmann/tint"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// version is set by the linker (make build, make release).
var version = ""

func programVersion() string {
	if version != "" {
		return version
	}
	if bi, ok := debug.ReadBuildInfo(); ok && bi.Main.Version != "" && bi.Main.Version != "(devel)" {
		return bi.Main.Version
	}
	return "devel"
}

// app is what all commands share: the flags that every command has, and the standard streams.
type app struct {
	std     stdio
	log     *slog.Logger
	verbose bool
	json    bool
	data    string
	metrics string
	pprof   bool
	nats    natsFlags
	watched atomic.Int64 // number of the process that runs the job, where this one only watches; 0: it does more
}

// groupRoles are the commands that run for long beside others, and log.
const groupRoles = "roles"

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "millrace",
		Short: "Run JSONL files of LLM requests over a fleet of GPUs, every line exactly once",
		Long: `millrace runs a JSONL file of LLM requests (OpenAI batch format) over any number of vLLM or other
OpenAI-compatible servers. Every line ends as exactly one line of the output or of the error file.

  millrace run requests.jsonl --engine http://localhost:8000        everything in one process
  millrace serve, millrace worker, millrace produce                 the same, spread over machines`,
		Version:           programVersion(),
		SilenceUsage:      true,
		SilenceErrors:     true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { return a.prepare(cmd) },
	}
	root.SetOut(a.std.out)
	root.SetErr(a.std.err)
	root.SetIn(a.std.in)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		var bad *pflag.InvalidValueError
		if errors.As(err, &bad) {
			return usagef("--%s is %s", bad.GetFlag().Name, misfit(bad))
		}
		return usagef("%w; see `%s --help`", err, cmd.CommandPath())
	})
	root.SetUsageTemplate(root.UsageTemplate() + `
Each flag is an environment variable, too: --ack-wait is MILLRACE_ACK_WAIT. Durations are written 30s, 10m, 1h30m.
`)
	pf := root.PersistentFlags()
	pf.BoolVarP(&a.verbose, "verbose", "v", false, "log details")
	pf.StringVar(&a.data, "data", "", "`DIR` for state (default: $XDG_STATE_HOME/millrace, else ~/.local/state/millrace)")
	root.AddGroup(&cobra.Group{ID: "work", Title: "Run jobs:"}, &cobra.Group{ID: groupRoles, Title: "Roles of a fleet:"},
		&cobra.Group{ID: "control", Title: "Look and control:"})
	add := func(group string, cmds ...*cobra.Command) {
		for _, c := range cmds {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	add("work", a.runCommand(), a.produceCommand(), a.validateCommand())
	add(groupRoles, a.brokerCommand(), a.aggregateCommand(), a.serveCommand(), a.workerCommand(), a.simCommand())
	add("control", a.statusCommand(), a.jobsCommand(), a.wantCommand("cancel"), a.wantCommand("pause"), a.wantCommand("resume"),
		a.resultsCommand(), a.verifyCommand(), a.rmCommand(), a.doctorCommand())
	for _, c := range root.Commands() {
		if c.GroupID == "control" {
			c.Flag("nats").Usage = "`URL` of the broker (default: $NATS_URL, else those of all runs of yours on this machine, else " + defaultNATS + ")"
		}
	}
	strict(root)
	return root
}

// strict makes the two commands that cobra adds refuse what is not there.
func strict(root *cobra.Command) {
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	for _, c := range root.Commands() {
		switch c.Name() {
		case "help":
			c.Args = func(_ *cobra.Command, args []string) error {
				_, _, err := root.Find(args)
				return err
			}
		case "completion":
			c.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
			c.Args = func(cmd *cobra.Command, args []string) error {
				if len(args) == 0 {
					return nil
				}
				return usagef("no completions for %q; see `%s --help`", args[0], cmd.CommandPath())
			}
		}
	}
}

// prepare fills flags from the environment, opens the log and checks what many commands have.
func (a *app) prepare(cmd *cobra.Command) error {
	if err := fromEnv(cmd.Flags(), os.LookupEnv); err != nil {
		return err
	}
	if a.data == "" {
		a.data = defaultData()
	}
	level := slog.LevelWarn // a command that talks to a person says by itself what there is to say
	switch {
	case a.verbose:
		level = slog.LevelDebug
	case cmd.GroupID == groupRoles:
		level = slog.LevelInfo
	}
	a.log = slog.New(tint.NewTextHandler(a.std.err, &tint.Options{Level: level, TimeFormat: time.TimeOnly, NoColor: !terminal(a.std.err)}))
	return a.checkMetrics()
}

// fromEnv sets each flag that was not given from MILLRACE_<FLAG>, dashes as underscores. Asking for help is no setting.
func fromEnv(fs *pflag.FlagSet, env func(string) (string, bool)) error {
	var err error
	fs.VisitAll(func(f *pflag.Flag) {
		name := envName(f)
		v, ok := env(name)
		if !ok || v == "" || f.Name == "help" || f.Changed || err != nil {
			return
		}
		values := []string{v}
		if f.Value.Type() == "stringArray" { // several, with commas
			values = strings.Split(v, ",")
		}
		if f.Name == "engine" {
			values = splitEngines(v)
		}
		for _, v := range values {
			var bad *pflag.InvalidValueError
			switch e := fs.Set(f.Name, strings.TrimSpace(v)); {
			case errors.As(e, &bad):
				err = usagef("environment variable %s is %s", name, misfit(bad))
			case e != nil:
				err = usagef("environment variable %s: %w", name, e)
			}
		}
	})
	return err
}

// misfit says what a flag was given, and what it takes.
func misfit(bad *pflag.InvalidValueError) string {
	takes, kind := "another value", bad.GetFlag().Value.Type()
	switch kind {
	case "duration":
		takes = "a time such as 30s, 10m or 1h30m"
	case "int", "int64":
		takes = "a whole number"
	case "uint64":
		takes = "a whole number, not negative"
	case "bool":
		takes = "true or false"
	}
	if errors.Is(bad, strconv.ErrRange) {
		takes += ", not that large"
	}
	return fmt.Sprintf("%q, must be %s", bad.GetValue(), takes)
}

func envName(f *pflag.Flag) string {
	return "MILLRACE_" + strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_"))
}

func defaultData() string {
	if d := os.Getenv("XDG_STATE_HOME"); d != "" {
		return filepath.Join(d, "millrace")
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return filepath.Join(os.TempDir(), fmt.Sprintf("millrace-%d", os.Getuid()))
	}
	return filepath.Join(home, ".local", "state", "millrace")
}

// terminal says whether w is one.
func terminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	st, err := f.Stat()
	return err == nil && st.Mode()&os.ModeCharDevice != 0 && os.Getenv("TERM") != "dumb"
}

func (a *app) jsonFlag(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&a.json, "json", false, "print JSON instead of text")
}
