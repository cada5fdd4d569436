package main

// The DHT's values: what is kept, for how long, and what is refused; and DHT messages
// that are too long or make no sense.

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	ds "github.com/ipfs/go-datastore"
	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	recpb "github.com/libp2p/go-libp2p-record/pb"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// What discovery rests on: a record keeps its publisher, because clients ignore one
// without. All devices of a group write one key, and the last one to write is found,
// whatever its clock says.
func TestRecordComesBackByteForByte(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	a, b := newClient(t), newClient(t)
	connect(t, a, r)
	connect(t, b, r)

	first := rustRecord(groupKey, `{"device_name":"A","addresses":[],"timestamp":2000}`, a.ID(), 7200)
	if err := put(t, a, r, first); err != nil {
		t.Fatalf("PUT by A: %v", err)
	}
	got := get(t, b, r, groupKey)
	if !bytes.Equal(got.GetKey(), first.Key) || !bytes.Equal(got.GetValue(), first.Value) {
		t.Errorf("GET by B = %q, %q, want what A put", got.GetKey(), got.GetValue())
	}
	if fields := got.ProtoReflect().GetUnknown(); !bytes.Equal(fields, rustFields(a.ID(), 7200)) {
		t.Errorf("publisher and ttl = %x, want %x", []byte(fields), rustFields(a.ID(), 7200))
	}

	second := rustRecord(groupKey, `{"device_name":"B","addresses":[],"timestamp":1000}`, b.ID(), 7200)
	if err := put(t, b, r, second); err != nil {
		t.Fatalf("PUT by B, with an older timestamp: %v", err)
	}
	if got := get(t, a, r, groupKey); !bytes.Equal(got.GetValue(), second.Value) {
		t.Errorf("GET by A = %q, want B's record, which arrived last", got.GetValue())
	}
}

// A record that is refused ends its stream and is not stored, and the relay goes on.
func TestRecordsThatAreRefused(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	c := newClient(t)
	connect(t, c, r)
	long := func(n int) string { return string(bytes.Repeat([]byte("x"), n)) }
	tests := []struct {
		name string
		rec  *recpb.Record
		ok   bool
	}{
		{"largest", rustRecord(append([]byte("/privstack/"), long(maxRecordKey-11)...), long(maxRecordValue), c.ID(), 1), true},
		{"any key below the prefix", rustRecord([]byte("/privstack/x"), "v", c.ID(), 1), true},
		{"value too long", rustRecord(groupKey, long(maxRecordValue+1), c.ID(), 1), false},
		{"value empty", rustRecord(groupKey, "", c.ID(), 1), false},
		{"key too long", rustRecord(append([]byte("/privstack/"), long(maxRecordKey-10)...), "v", c.ID(), 1), false},
		{"prefix alone", rustRecord([]byte("/privstack/"), "v", c.ID(), 1), false},
		{"another prefix", rustRecord([]byte("/ipns/x"), "v", c.ID(), 1), false},
		{"no prefix", rustRecord([]byte("x"), "v", c.ID(), 1), false},
		{"publisher too long", rustRecord(groupKey, "v", peer.ID(long(200)), 1), false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := put(t, c, r, tt.rec)
			if (err == nil) != tt.ok {
				t.Errorf("PUT: error = %v, want ok = %v", err, tt.ok)
			}
			if got := get(t, c, r, tt.rec.Key); (got != nil) != tt.ok {
				t.Errorf("GET finds %v, want found = %v", got, tt.ok)
			}
		})
	}
}

// The relay is no storage for fields that no client reads.
func TestUnknownFieldsAreNotStored(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	c := newClient(t)
	connect(t, c, r)
	rec := rustRecord(groupKey, "v", c.ID(), 9)
	want := bytes.Clone(rec.ProtoReflect().GetUnknown())
	junk := protowire.AppendBytes(protowire.AppendTag(nil, 99, protowire.BytesType), make([]byte, 4000))
	rec.ProtoReflect().SetUnknown(append(junk, want...))
	if err := put(t, c, r, rec); err != nil {
		t.Fatal(err)
	}
	if got := get(t, c, r, groupKey).ProtoReflect().GetUnknown(); !bytes.Equal(got, want) {
		t.Errorf("unknown fields take %d bytes, want the %d of publisher and ttl", len(got), len(want))
	}
}

// However many records an attacker puts, they take only the memory set aside for them.
func TestRecordStoreStaysWithinItsBounds(t *testing.T) {
	ctx := context.Background()
	key := func(i int) ds.Key { return ds.NewKey(fmt.Sprint("/privstack/", i)) }
	tests := []struct {
		name       string
		maxRecords int
		maxBytes   int64
		value      int
		want       int // records left of 100
	}{
		{"records", 10, 1 << 30, 100, 10},
		{"bytes", 1000, 10 * (1000 + recordOverhead + 14), 1000, 10},
		{"one that is too large", 10, 1000, 1000, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := newRecordStore(tt.maxRecords, tt.maxBytes)
			s.Put(ctx, key(0), make([]byte, tt.value))
			for i := range 100 {
				if i == 95 { // refreshed, so not the oldest any more
					s.Put(ctx, key(90), make([]byte, tt.value))
				}
				s.Put(ctx, key(i), make([]byte, tt.value))
			}
			left := 0
			for i := range 100 {
				if _, err := s.Get(ctx, key(i)); err == nil {
					left++
					if i < 100-tt.want {
						t.Errorf("record %d is still there, but others that were put later are gone", i)
					}
				}
			}
			if _, held := s.held(); left != tt.want || held > tt.maxBytes {
				t.Errorf("%d records of %d bytes are left, want %d within %d", left, held, tt.want, tt.maxBytes)
			}
			for i := range 100 {
				s.Delete(ctx, key(i))
			}
			if n, held := s.held(); n != 0 || held != 0 || len(s.holders) != 0 || len(s.all.parts) != 0 || s.byAge.Len() != 0 {
				t.Errorf("the empty store has %d records of %d bytes by %d holders", n, held, len(s.holders))
			}
		})
	}
}

// Where everybody has one record, the store drops the one that was not refreshed for
// longest: a device that is connected refreshes its own.
func TestOfEqualsTheOldestRecordGoes(t *testing.T) {
	ctx := context.Background()
	const most = 50
	s := newRecordStore(most, 1<<30)
	put := func(i int) {
		id := holderID{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(i / 3), 0}), 32), peer.ID(fmt.Sprint("peer", i))}
		key := fmt.Sprint("/privstack/", i)
		rec := &recpb.Record{Key: []byte(key), Value: make([]byte, 1+i*7%900)}
		data, err := proto.Marshal(rec)
		if err != nil {
			t.Fatal(err)
		}
		s.expect(rec, id)
		s.Put(ctx, ds.NewKey(key), data)
	}
	for i := range 200 {
		put(3 * i) // each in a network of its own
		put(0)     // refreshed
	}
	if _, err := s.Get(ctx, ds.NewKey("/privstack/0")); err != nil {
		t.Error("a record is gone although it was refreshed")
	}
	for i := 1; i < 200; i++ {
		_, err := s.Get(ctx, ds.NewKey(fmt.Sprint("/privstack/", 3*i)))
		if there := err == nil; there != (i > 200-most) {
			t.Errorf("record %d of 200: still there = %v, with room for the last %d", i, there, most)
		}
	}
}

// Someone who fills the store, from one identity or from many, loses only records of his
// own.
func TestFloodEvictsItsOwnRecords(t *testing.T) {
	const honest, flood = 100, 5000
	ctx := context.Background()
	putAs := func(s *recordStore, id holderID, i int, size int) {
		key := fmt.Sprintf("/privstack/%s/%d", string(id.peer), i)
		rec := &recpb.Record{Key: []byte(key), Value: make([]byte, size)}
		data, err := proto.Marshal(rec)
		if err != nil {
			t.Fatal(err)
		}
		s.expect(rec, id)
		s.Put(ctx, ds.NewKey(key), data)
	}
	network := func(i int) netip.Prefix { return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}), 32) }
	for _, tt := range []struct {
		name               string
		attackers, records int // records of each
		home               int // the honest ones' networks begin here, the attackers' is 0
	}{
		{"one peer", 1, flood, 1},
		{"fifty peers of one address", 50, flood / 50, 1},
		{"one peer in the network of the others", 1, flood, 0},
		{"a new identity for each record", flood, 1, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newRecordStore(1024, 1024*4<<10)
			for i := range honest {
				in := network(tt.home)
				if tt.home > 0 {
					in = network(tt.home + i)
				}
				putAs(s, holderID{in, peer.ID(fmt.Sprint("honest ", i))}, 0, 300)
			}
			for a := range tt.attackers {
				for i := range tt.records {
					putAs(s, holderID{network(0), peer.ID(fmt.Sprint("attacker ", a))}, i, 8<<10)
				}
			}
			lost := 0
			for i := range honest {
				if _, err := s.Get(ctx, ds.NewKey(fmt.Sprintf("/privstack/honest %d/0", i))); err != nil {
					lost++
				}
			}
			n, held := s.held()
			if lost > 0 || n > 1024 || held > 1024*4<<10 {
				t.Errorf("%d of %d honest records are lost; %d records of %d bytes", lost, honest, n, held)
			}
		})
	}
}

// A record takes no more memory than the bound counts for it.
func TestRecordOverheadIsNoLess(t *testing.T) {
	const n = 20_000
	s := newRecordStore(n, 1<<40)
	before := liveHeap()
	data := 0
	for i := range n {
		key := fmt.Sprintf("/privstack/syncgroup/%032d", i)
		rec := &recpb.Record{Key: []byte(key), Value: make([]byte, 300)}
		encoded, err := proto.Marshal(rec)
		if err != nil {
			t.Fatal(err)
		}
		data += len(key) + len(encoded)
		s.expect(rec, holderID{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 32), peer.ID(fmt.Sprintf("%038d", i))})
		s.Put(context.Background(), ds.NewKey(key), encoded)
	}
	each := (int(liveHeap()-before) - data) / n
	runtime.KeepAlive(s)
	t.Logf("%d bytes for each record, beside its key and data", each)
	if each > recordOverhead {
		t.Errorf("a record costs %d bytes beside its key and data, more than the %d that are counted", each, recordOverhead)
	}
}

// A device that has been off for two days is no longer found.
func TestOldRecordsAreNotServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := context.Background()
		s := newRecordStore(10, 1<<20)
		old, fresh := ds.NewKey("/privstack/old"), ds.NewKey("/privstack/fresh")
		s.Put(ctx, old, []byte("x"))
		time.Sleep(maxRecordAge)
		if _, err := s.Get(ctx, old); err != nil {
			t.Errorf("after %v: %v, want the record", maxRecordAge, err)
		}
		time.Sleep(time.Second)
		if _, err := s.Get(ctx, old); !errors.Is(err, ds.ErrNotFound) {
			t.Errorf("a second later: error = %v, want ErrNotFound", err)
		}
		s.Put(ctx, fresh, []byte("x"))
		if n, _ := s.held(); n != 1 {
			t.Errorf("%d records are kept, want only the fresh one", n)
		}
	})
}

// A device that puts its record for two seconds, because it is about to leave, is not
// named after that. The old relay took it at its word, and so do we.
func TestRecordEndsWithItsTTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := context.Background()
		for _, tt := range []struct {
			ttl  uint64 // seconds
			keep time.Duration
		}{
			{2, 2 * time.Second},
			{3600, time.Hour},
			{0, maxRecordAge}, // says nothing
			{1 << 30, maxRecordAge},
			{1<<32 + 2, 2 * time.Second}, // the field has 32 bits
		} {
			s := newRecordStore(10, 1<<20)
			key := ds.NewKey("/privstack/x")
			data, err := proto.Marshal(rustRecord([]byte("/privstack/x"), "x", "somebody", tt.ttl))
			if err != nil {
				t.Fatal(err)
			}
			s.Put(ctx, key, data)
			time.Sleep(tt.keep)
			if _, err := s.Get(ctx, key); err != nil {
				t.Errorf("a ttl of %d s, after %v: %v, want it served", tt.ttl, tt.keep, err)
			}
			time.Sleep(time.Millisecond)
			if _, err := s.Get(ctx, key); !errors.Is(err, ds.ErrNotFound) {
				t.Errorf("a ttl of %d s, past %v: error = %v, want ErrNotFound", tt.ttl, tt.keep, err)
			}
			if n, _ := s.held(); n != 0 {
				t.Errorf("a ttl of %d s: %d records are kept past it, want 0", tt.ttl, n)
			}
		}
	})

	// It comes through kad-dht as the device sent it.
	r := newTestRelay(t, defaultConfig(t))
	c := newClient(t)
	connect(t, c, r)
	if err := put(t, c, r, rustRecord(groupKey, "x", c.ID(), 2)); err != nil {
		t.Fatal(err)
	}
	r.records.mu.Lock()
	defer r.records.mu.Unlock()
	for key, rec := range r.records.records {
		if rec.keep != 2*time.Second {
			t.Errorf("%v is kept for %v, want 2s", key, rec.keep)
		}
	}
	if n := len(r.records.records); n != 1 {
		t.Errorf("%d records are kept, want 1", n)
	}
}

// Four bytes that announce a message of 4 MiB must not make the relay allocate it.
func TestOverlongKadMessageEndsTheStream(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	c := newClient(t)
	connect(t, c, r)
	for _, length := range []uint64{maxKadMessage + 1, 4 << 20, 1 << 40, 1<<64 - 1} {
		s, err := c.NewStream(testContext(t), r.info.ID, kadProtocol)
		if err != nil {
			t.Fatal(err)
		}
		s.Write(binary.AppendUvarint(nil, length))
		s.SetReadDeadline(time.Now().Add(testTimeout))
		if _, err := s.Read(make([]byte, 1)); !errors.Is(err, network.ErrReset) {
			t.Errorf("message of %d bytes announced: read error = %v, want a reset", length, err)
		}
	}
	ask(t, c, r, kadpb.NewMessage(kadpb.Message_PING, nil, 0))
}

// Whatever arrives on a DHT stream, the relay answers or ends the stream, and serves the
// next one.
func FuzzKadMessage(f *testing.F) {
	frame := func(m *kadpb.Message) []byte {
		var b bytes.Buffer
		protodelim.MarshalTo(&b, m)
		return b.Bytes()
	}
	id := peer.ID("\x00\x24\x08\x01\x12\x20" + string(make([]byte, 32)))
	putReq := kadpb.NewMessage(kadpb.Message_PUT_VALUE, groupKey, 0)
	putReq.Record = rustRecord(groupKey, "value", id, 60)
	f.Add(frame(putReq))
	for typ := range kadpb.Message_MessageType_name {
		f.Add(frame(&kadpb.Message{Type: kadpb.Message_MessageType(typ), Key: groupKey,
			CloserPeers: []*kadpb.Message_Peer{{Id: []byte(id), Addrs: [][]byte{{4, 1, 2, 3}}, Connection: 7}}}))
	}
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0x7f})
	f.Add([]byte{0})

	r := newTestRelay(f, defaultConfig(f))
	c := newClient(f)
	connect(f, c, r)
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := c.NewStream(testContext(t), r.info.ID, kadProtocol)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Reset()
		s.SetDeadline(time.Now().Add(testTimeout))
		s.Write(data)
		s.CloseWrite()
		answer, err := io.ReadAll(s)
		if err != nil && !errors.Is(err, network.ErrReset) {
			t.Errorf("read error = %v, want the end or a reset", err)
		}
		if len(answer) > 1<<20 {
			t.Errorf("%d bytes are answered with %d", len(data), len(answer))
		}
		ask(t, c, r, kadpb.NewMessage(kadpb.Message_PING, nil, 0))
	})
}

// However the bytes are cut into reads, a reader gets the same of them: all up to a
// length that is too long, and nothing after that.
func FuzzKadFrames(f *testing.F) {
	f.Add([]byte{3, 1, 2, 3, 0, 1, 9}, byte(1))
	f.Add(binary.AppendUvarint(make([]byte, 300), maxKadMessage+1), byte(7))
	f.Add(bytes.Repeat([]byte{0xff}, 20), byte(200))
	longest := append(binary.AppendUvarint(nil, maxKadMessage), make([]byte, maxKadMessage)...)
	f.Add(slices.Concat(longest, longest, binary.AppendUvarint(nil, maxKadMessage+1), []byte{1, 2, 3}), byte(250))
	f.Add([]byte{0x80, 0x80, 0x00, 1}, byte(2))
	f.Fuzz(func(t *testing.T, data []byte, most byte) {
		// A reader may get the first fine bytes, by encoding/binary's own reading of the
		// lengths.
		fine, overlong := len(data), false
		for rest := data; len(rest) > 0; {
			length, n := binary.Uvarint(rest)
			if n == 0 && len(rest) < binary.MaxVarintLen64 { // cut off
				break
			}
			if n <= 0 || length > maxKadMessage {
				fine, overlong = len(data)-len(rest), true
				break
			}
			rest = rest[min(n+int(length), len(rest)):]
		}
		s := &kadStream{Stream: memoryStream{Reader: bytes.NewReader(data)}}
		var got []byte
		var err error
		for err == nil {
			p := make([]byte, 1+int(most))
			var n int
			n, err = s.Read(p)
			got = append(got, p[:n]...)
		}
		if overlong != errors.Is(err, errKadMessageTooLong) {
			t.Errorf("read error = %v after %d of %d bytes, overlong %v", err, len(got), len(data), overlong)
		}
		// Of a length that takes ten bytes, all but the last may be read.
		if !bytes.HasPrefix(data, got) || !overlong && len(got) != fine || overlong && len(got) >= fine+binary.MaxVarintLen64 {
			t.Errorf("%d bytes were read, want %d", len(got), fine)
		}
	})
}

// Whatever a record's unknown fields hold, only those that clients use are kept, and
// they stay the same, also when they are filtered again.
func FuzzRecordExtras(f *testing.F) {
	f.Add(rustFields("publisher", 60))
	f.Add(append(protowire.AppendVarint(protowire.AppendTag(nil, 3, protowire.VarintType), 7), rustFields("p", 1)...))
	f.Add(protowire.AppendTag(nil, 666, protowire.StartGroupType))
	f.Add([]byte{0xff})
	f.Fuzz(func(t *testing.T, unknown []byte) {
		rec := new(recpb.Record)
		rec.ProtoReflect().SetUnknown(unknown)
		extras, err := readExtras(rec)
		if err != nil {
			return
		}
		if !bytes.Contains(extras.encoded, []byte(extras.publisher)) {
			t.Errorf("%x is kept as %x, without the publisher %x", unknown, extras.encoded, string(extras.publisher))
		}
		rec.ProtoReflect().SetUnknown(extras.encoded)
		again, err := readExtras(rec)
		if err != nil || again.publisher != extras.publisher || !bytes.Equal(again.encoded, extras.encoded) {
			t.Errorf("%x is kept as %v, and that as %v, %v", unknown, extras, again, err)
		}
		for rest := extras.encoded; len(rest) > 0; {
			num, _, n := protowire.ConsumeField(rest)
			if num != 666 && num != 777 || !bytes.Contains(unknown, rest[:n]) {
				t.Fatalf("of %x the field %x is kept", unknown, rest[:n])
			}
			rest = rest[n:]
		}
	})
}
