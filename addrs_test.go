package main

// Which addresses belong together.

import (
	"net/netip"
	"testing"
)

// Two devices of one home share the NAT's IPv4 address, but only 64 bits of their
// IPv6 addresses. If the relay took them for strangers, they would not learn of
// each other's LAN addresses.
func TestSameLAN(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		want bool
	}{
		{"11.2.0.1", "11.2.0.1", true},
		{"11.2.0.1", "11.2.0.2", false},
		{"2a00:1:2:3::10", "2a00:1:2:3:aaaa:bbbb:cccc:dddd", true},
		{"2a00:1:2:3::10", "2a00:1:2:4::10", false},
		{"11.2.0.1", "2a00:1:2:3::10", false},
		{"2a00:1:2:3::10", "11.2.0.1", false},
	} {
		if got := sameLAN(netip.MustParseAddr(tt.a), netip.MustParseAddr(tt.b)); got != tt.want {
			t.Errorf("sameLAN(%s, %s) = %v, want %v", tt.a, tt.b, got, tt.want)
		}
	}
	if sameLAN(netip.Addr{}, netip.Addr{}) {
		t.Error("two unknown addresses are taken for one home")
	}
}
