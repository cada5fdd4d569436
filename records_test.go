package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"runtime"
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

// The contract of discovery: clients ignore a record without publisher, all
// devices of a group write one key, and the last to write is the one found,
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
		t.Errorf("GET by A = %q, want B's, which arrived last", got.GetValue())
	}
}

// Whatever is put, the relay goes on; what it refuses, it says so by ending the
// stream.
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

// Fields that no client reads are not carried for whoever put them there.
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
		t.Errorf("unknown fields = %d bytes, want the %d of publisher and ttl", len(got), len(want))
	}
}

// An attacker's records, however many, take the memory that was set aside.
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
						t.Errorf("record %d is left, which was put before others that are gone", i)
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
				t.Errorf("empty store holds %d records of %d bytes of %d holders", n, held, len(s.holders))
			}
		})
	}
}

// Where everybody holds one record, of whatever size, the one unrefreshed for
// longest goes: a device that is there refreshes its own.
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
		t.Error("the record that was refreshed is gone")
	}
	for i := 1; i < 200; i++ {
		_, err := s.Get(ctx, ds.NewKey(fmt.Sprint("/privstack/", 3*i)))
		if there := err == nil; there != (i > 200-most) {
			t.Errorf("record %d of 200: there = %v, with room for the last %d", i, there, most)
		}
	}
}

// One who fills the store, from one identity or from many, loses his own records
// and nobody else's.
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

// A record's place in memory is what the bound counts for it.
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
	t.Logf("%d bytes each beside key and data", each)
	if each > recordOverhead {
		t.Errorf("an entry costs %d bytes beside its key and data, above %d", each, recordOverhead)
	}
}

// A device that has been off for two days is not to be found where it was.
func TestOldRecordsAreNotServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := context.Background()
		s := newRecordStore(10, 1<<20)
		old, fresh := ds.NewKey("/privstack/old"), ds.NewKey("/privstack/fresh")
		s.Put(ctx, old, []byte("x"))
		time.Sleep(maxRecordAge)
		if _, err := s.Get(ctx, old); err != nil {
			t.Errorf("after %v: %v, want it served", maxRecordAge, err)
		}
		time.Sleep(time.Second)
		if _, err := s.Get(ctx, old); !errors.Is(err, ds.ErrNotFound) {
			t.Errorf("a second later: error = %v, want ErrNotFound", err)
		}
		s.Put(ctx, fresh, []byte("x"))
		if n, _ := s.held(); n != 1 {
			t.Errorf("%d records are kept, want the fresh one alone", n)
		}
	})
}

// Four bytes that announce 4 MiB must not make the relay set them aside.
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

// However the bytes are cut into reads, the frames are the same.
func TestBoundedStreamFollowsFrames(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		var data []byte
		for range rng.IntN(5) {
			length := rng.IntN(maxKadMessage + 1)
			data = append(binary.AppendUvarint(data, uint64(length)), make([]byte, length)...)
		}
		fine := len(data)
		data = binary.AppendUvarint(data, maxKadMessage+1+uint64(rng.IntN(1<<20)))
		overlong := len(data)
		data = append(data, 1, 2, 3)

		s := &kadStream{Stream: memoryStream{Reader: bytes.NewReader(data)}}
		read := 0
		for {
			n, err := s.Read(make([]byte, 1+rng.IntN(1000)))
			read += n
			if err == nil {
				continue
			}
			if !errors.Is(err, errKadMessageTooLong) {
				t.Fatalf("read error = %v, want %v", err, errKadMessageTooLong)
			}
			break
		}
		if read >= overlong || read < fine-1000 {
			t.Fatalf("%d bytes were read, want at most those before the overlong length's last, at %d", read, overlong-1)
		}
	}
}

// Any bytes on the DHT's stream: the relay answers or ends the stream, and
// serves the next.
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
			t.Errorf("%d bytes asked, %d answered", len(data), len(answer))
		}
		ask(t, c, r, kadpb.NewMessage(kadpb.Message_PING, nil, 0))
	})
}

// However bytes are cut into reads: the same are read, up to the length that is
// too long, and nothing after it.
func FuzzKadFrames(f *testing.F) {
	f.Add([]byte{3, 1, 2, 3, 0, 1, 9}, byte(1))
	f.Add(binary.AppendUvarint(make([]byte, 300), maxKadMessage+1), byte(7))
	f.Add(bytes.Repeat([]byte{0xff}, 20), byte(200))
	f.Add([]byte{0x80, 0x80, 0x00, 1}, byte(2))
	f.Fuzz(func(t *testing.T, data []byte, most byte) {
		// fine is what a reader may get: frames as encoding/binary has them.
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
		// A varint of ten bytes may be read but for its last.
		if !bytes.HasPrefix(data, got) || !overlong && len(got) != fine || overlong && len(got) >= fine+binary.MaxVarintLen64 {
			t.Errorf("%d bytes were read, want those before %d", len(got), fine)
		}
	})
}

// A record's unknown fields may be anything: what is kept is what clients use,
// unchanged, and keeping it again changes nothing.
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
			t.Errorf("of %x is kept %x, and the publisher is %x", unknown, extras.encoded, string(extras.publisher))
		}
		rec.ProtoReflect().SetUnknown(extras.encoded)
		again, err := readExtras(rec)
		if err != nil || again.publisher != extras.publisher || !bytes.Equal(again.encoded, extras.encoded) {
			t.Errorf("of %x is kept %v, of which is kept %v, %v", unknown, extras, again, err)
		}
		for rest := extras.encoded; len(rest) > 0; {
			num, _, n := protowire.ConsumeField(rest)
			if num != 666 && num != 777 || !bytes.Contains(unknown, rest[:n]) {
				t.Fatalf("of %x is kept %x", unknown, rest[:n])
			}
			rest = rest[n:]
		}
	})
}
