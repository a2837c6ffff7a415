// Package tap prints results in the Test Anything Protocol, version 13. The programs of runtime-tools expect a library of this name
// and interface, which Debian does not have.
package tap

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
)

// T counts and prints the results of one program.
type T struct {
	// Writer is where results go: standard output, unless set.
	Writer io.Writer

	count *int
	todo  bool
}

// New begins a program's results.
func New() *T {
	return &T{count: new(int)}
}

func (t *T) print(text string) {
	var writer io.Writer = os.Stdout
	if t.Writer != nil {
		writer = t.Writer
	}
	fmt.Fprintln(writer, text)
}

// Header says how many results will come; nothing of that if it is not known yet.
func (t *T) Header(count int) {
	t.print("TAP version 13")
	if count > 0 {
		t.print(fmt.Sprintf("1..%d", count))
	}
}

// AutoPlan says, at the end, how many results have come.
func (t *T) AutoPlan() {
	t.print(fmt.Sprintf("1..%d", *t.count))
}

// Ok is one result.
func (t *T) Ok(passed bool, description string) {
	word := "ok"
	if !passed {
		word = "not ok"
	}
	directive := ""
	if t.todo {
		directive = " # TODO"
	}
	*t.count++
	t.print(fmt.Sprintf("%s %d - %s%s", word, *t.count, description, directive))
}

// Pass is a result that is good.
func (t *T) Pass(description string) {
	t.Ok(true, description)
}

// Fail is a result that is bad.
func (t *T) Fail(description string) {
	t.Ok(false, description)
}

// Skip is some results that cannot be had.
func (t *T) Skip(count int, reason string) {
	for ; count > 0; count-- {
		*t.count++
		t.print(fmt.Sprintf("ok %d # SKIP %s", *t.count, reason))
	}
}

// Todo gives results that are known to be bad, and do not count.
func (t *T) Todo() *T {
	known := *t
	known.todo = true
	return &known
}

// Diagnostic is a comment.
func (t *T) Diagnostic(text string) {
	t.print("# " + strings.ReplaceAll(text, "\n", "\n# "))
}

// Diagnosticf is a comment, formatted.
func (t *T) Diagnosticf(format string, values ...interface{}) {
	t.Diagnostic(fmt.Sprintf(format, values...))
}

// YAML is what belongs to the last result, as JSON, which is YAML too.
func (t *T) YAML(value interface{}) error {
	text, err := json.MarshalIndent(value, "  ", "  ")
	if err != nil {
		return err
	}
	t.print("  ---\n  " + string(text) + "\n  ...")
	return nil
}
