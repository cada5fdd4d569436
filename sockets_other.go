//go:build !linux

package main

// Linux alone has what sockets_linux.go does.

import (
	"net"

	"github.com/quic-go/quic-go"
)

func coalescing(conn *net.UDPConn) quic.OOBCapablePacketConn { return conn }
