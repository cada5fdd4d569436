//go:build !linux

package main

import (
	"errors"
	"io"
)

// runLabDelay is for Linux alone, as is the whole lab.
func runLabDelay(string, io.Writer) error { return errors.ErrUnsupported }
