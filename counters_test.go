package main

// How well distinct peers are counted.

import (
	"fmt"
	"math"
	"testing"
)

// The number of unique peers is exact while it is small, and close when it is too large
// for anyone to check.
func TestUniqueCounter(t *testing.T) {
	c := newUniqueCounter()
	for n, next := 0, 1; n < 1_000_000; {
		for ; n < next; n++ {
			id := fmt.Sprint("peer", n)
			c.add(id)
			if c.add(id) {
				t.Fatalf("%q is counted twice", id)
			}
		}
		if got, tolerance := c.count(), math.Ceil(float64(n)*0.002); math.Abs(float64(got-n)) > tolerance {
			t.Errorf("count = %d after %d distinct IDs, want that within %v", got, n, tolerance)
		}
		next *= 10
	}
}
